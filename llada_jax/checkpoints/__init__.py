"""Where weights are kept: Orbax checkpoints, the published layout."""
