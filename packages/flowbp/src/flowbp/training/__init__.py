"""The training loop, its state, its checks before the start, its watchdog.  Knows nothing of the command line."""
