"""HTML reports and figures, from nothing but the run folder.

Knows nothing of training.
"""
