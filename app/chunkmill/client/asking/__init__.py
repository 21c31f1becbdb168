"""How calls ask the workers for vectors: what is known already, what is asked, and how the answers are awaited."""
