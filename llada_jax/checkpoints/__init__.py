"""Checkpoints: training checkpoints by Orbax, and the published Hugging Face layout."""
