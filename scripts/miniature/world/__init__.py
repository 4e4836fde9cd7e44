"""Trains the miniature's models: `python -m scripts.miniature.world --help`."""
