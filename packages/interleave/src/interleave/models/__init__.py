"""Chat models and image generators, local and remote.  Knows nothing of agents or of the loop."""
