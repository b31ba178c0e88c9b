"""Hypothesis profiles. `ci`, the default, draws the same examples every time; ``pytest --hypothesis-profile nightly`` draws new ones."""

from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile("ci")
