"""The loop that plans, generates, judges and rewrites, and its run folder.  Knows nothing of training or of pages."""
