"""A conversation with a model in a terminal: `python -m llada_jax.chat --model=DIR`."""
