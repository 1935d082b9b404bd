"""Compiles the training step of a config for chips that this machine does not have."""
