"""The paid routes: ProviderBatches, step by step, and plain requests for work that cannot wait. It never imports
torch."""
