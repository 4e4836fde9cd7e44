"""Benchmarks that need both products."""
