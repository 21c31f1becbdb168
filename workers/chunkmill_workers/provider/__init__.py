"""The paid routes: one ProviderBatch's life, step by step, and plain requests for what cannot wait. No torch here."""
