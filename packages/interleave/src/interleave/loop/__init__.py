"""The loop that plans, generates, judges and rewrites, and the run folder it works in.

Knows nothing of training or of pages.
"""
