"""Data: reads text sources, packs them into rows of tokens, and forms batches."""
