"""The served Batch API: uploads, the lines of a file, the steps of a batch, and the files of its results.

``keeper`` brings batches from state to state; the requests of ``chunkmill.gateway.routes`` only begin and read them.
"""
