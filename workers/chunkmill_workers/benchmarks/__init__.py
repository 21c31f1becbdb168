"""Measures the speed and the costs of Chunkmill beside its peers: ``python -m chunkmill_workers.benchmarks``."""
