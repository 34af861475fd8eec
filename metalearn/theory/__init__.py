"""Claims of papers as numbers: pure functions in float64, without a trainer. `metalearn report` runs their studies."""
