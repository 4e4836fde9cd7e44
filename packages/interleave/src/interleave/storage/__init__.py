"""What a run writes: images under the hash of their pixels, and a trace that only grows.  Knows no model."""
