"""The Holt backend of kvcensus: an index in a persistent adaptive radix tree."""
