"""Scores of generated images: evaluations, comparisons, the papers' benchmarks.  Knows nothing of training."""
