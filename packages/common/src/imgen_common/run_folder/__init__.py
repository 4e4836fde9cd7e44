"""Run folders: configuration, metrics, checkpoints, environment."""
