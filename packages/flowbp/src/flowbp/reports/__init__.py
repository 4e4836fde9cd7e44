"""HTML reports and figures from the files of a run folder.  Knows nothing of training."""
