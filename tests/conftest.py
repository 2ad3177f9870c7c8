"""Settings of all tests: generated examples are the same in every run, so that a change is judged and not the luck of the draw."""

from hypothesis import settings

settings.register_profile("repeatable", derandomize=True, database=None)
settings.load_profile("repeatable")
