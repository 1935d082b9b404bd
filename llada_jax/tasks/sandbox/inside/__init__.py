"""The inside of the sandbox: a program of its own, which needs the standard library alone.

The parent starts it as `python -s -S -P`, and it never imports the rest of llada_jax: the sandbox
does not show it.
"""
