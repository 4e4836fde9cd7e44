"""Sampling, gradients and plans, as mathematics.

Knows callables and tensors: no network library, no file, no prompt, no process.
"""
