"""`metalearn check`: whether what a run computes is what its mathematics says, on the user's own model and data."""
