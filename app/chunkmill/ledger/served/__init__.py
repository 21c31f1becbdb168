"""The Batch API that gateways serve: its files, its batches, and the lines of each."""
