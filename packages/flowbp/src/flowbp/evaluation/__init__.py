"""Scores of generated images: evaluations, comparisons with intervals, and the benchmarks of the papers.

Knows nothing of training.
"""
