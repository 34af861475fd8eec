"""How fast a meta-step is, beside other libraries: `metalearn bench`."""
