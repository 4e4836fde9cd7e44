"""A busy machine may be slow: no example has a deadline of Hypothesis's own."""

from hypothesis import settings

settings.register_profile("interleave", deadline=None)
settings.load_profile("interleave")
