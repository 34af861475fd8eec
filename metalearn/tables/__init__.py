"""Tables of results beside the published numbers."""
