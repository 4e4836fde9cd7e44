"""Benchmarks that are run by hand and print what they measure; benchmarks/README.md describes them."""
