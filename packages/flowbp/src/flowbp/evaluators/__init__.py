"""Judges of pictures that give no gradient: for evaluation only."""
