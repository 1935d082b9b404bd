"""Parallelism: meshes, data and model parallel steps, and coordination between hosts."""
