"""The adapter of each model family: one small module, which knows its pipeline, and no other family but a relative."""
