"""The paid routes: ProviderBatches, step by step, and plain requests for what cannot wait. It never imports torch."""
