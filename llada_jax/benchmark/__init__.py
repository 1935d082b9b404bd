"""How fast a step, a load, a sampler and plain PyTorch loops are."""
