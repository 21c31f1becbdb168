"""How the spaces of a collection beside its active one get their vectors."""
