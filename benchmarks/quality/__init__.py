"""Benchmarks of the quality of methods, agents and gradients."""
