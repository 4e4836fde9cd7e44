"""Prompts and their embeddings.  Knows nothing of training."""
