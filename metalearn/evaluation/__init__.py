"""From per-episode scores to what a result says."""
