"""Trains the miniature's models: `python -m imgen_common.shapes.train --help`."""
