"""What all tests share: Hypothesis profiles, and threads that sleep while they wait.

The profile `ci`, the default, draws the same examples every time; ``pytest --hypothesis-profile nightly`` draws new ones.
"""

from hypothesis import settings

from kvstore.settings import set_environment

# The tests run models beside nodes, Redis and Ray: spinning OpenMP threads would take the cores from them. Read by torch on import.
set_environment({"OMP_WAIT_POLICY": "PASSIVE"})

settings.register_profile("ci", derandomize=True, deadline=None)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile("ci")
