"""HTML pages about runs, stories and training sets.

Knows nothing of training.
"""
