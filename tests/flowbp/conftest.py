"""Property tests are not timed one by one: the machine may be busy."""

from hypothesis import settings

settings.register_profile("flowbp", deadline=None)
settings.load_profile("flowbp")
