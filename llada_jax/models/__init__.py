"""Architectures, one in each file, and the parts that they share."""
