"""The adaptation learning rate of a run, estimated from its own training tasks before any training."""
