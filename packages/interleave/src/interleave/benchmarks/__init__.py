"""The official benchmarks, one small file each, over one runner: load, generate, ask a judge, aggregate.

What is here knows the loop and its records; it does not train, and no other room but the command line uses it.
"""
