"""metalearn: a Hydra-configured experiment runner for meta-learning on PyTorch."""
