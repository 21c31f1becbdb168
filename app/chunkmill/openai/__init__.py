"""OpenAI's API and the servers that speak it. Only ``http`` sends requests; nothing here knows a database.

``plan`` decides what to send and what to do next: ``inputs`` (a content as the provider may take it), ``packing``
(requests and ProviderBatches under every limit), ``assemble`` (from answers to vectors) and ``endings`` (what to do
after a failure). ``wire`` reads and writes what is sent: ``jsonl`` (the lines of files), ``vectors``, ``status`` (what
the provider says about a batch) and ``redaction``. ``catalogue`` says which models the provider serves.
"""
