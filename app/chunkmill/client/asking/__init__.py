"""How calls get vectors: from the cache and the store if they are known, otherwise by requests to workers, whose
answers they await."""
