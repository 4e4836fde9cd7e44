"""The four choices that make a method, each a union of frozen values discriminated on `kind`.

A choice that a new paper needs is one class here; every method can then use it.  No torch.
"""
