"""What a model is tested on, one task a file."""
