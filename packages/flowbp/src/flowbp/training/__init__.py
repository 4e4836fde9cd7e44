"""The training loop, its state, its checks before the start, and its watchdog.

Knows nothing of the command line.
"""
