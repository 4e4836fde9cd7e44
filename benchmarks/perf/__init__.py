"""Benchmarks of memory and time."""
