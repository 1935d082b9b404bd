"""The very step of a config, compiled for chips that are not there."""
