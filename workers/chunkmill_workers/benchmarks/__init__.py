"""What Chunkmill costs and gives, measured beside its peers: ``python -m chunkmill_workers.benchmarks``."""
