"""Bridges: they carry the query vectors of one model into the space of another. NumPy alone.

An adapter is learnt from texts that have a vector in both spaces, and judged with queries that it was not learnt from
(Drift-Adapter, arXiv 2509.23471). docs/bridges.md says what that costs and when it pays.
"""
