"""How fast a step, a load and a plain PyTorch loop are."""
