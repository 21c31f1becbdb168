"""OpenAI's Batch API and the servers that speak it: what can be decided without HTTP and without a database.

``inputs`` (a content as the provider may take it) → ``packing`` (requests and ProviderBatches under every limit) →
``jsonl`` (lines out, lines back in) · ``status`` (what the provider says of a batch) · ``endings`` (what to do next).
"""
