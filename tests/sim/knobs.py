"""What a simulated cluster suffers: drawn from the seed, so that some runs are calm but long and others all fault."""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvstore.eviction import names


@dataclass(frozen=True, slots=True)
class Knobs:
    """One run's shape; times in seconds of virtual time, chances from 0 to 1.

    Parameters
    ----------
    nodes, clients : int
    pages : int
        Pages of each node's arena.
    policy : str
        Eviction policy of all nodes.
    spill : int
        Bytes of the tier behind each arena; 0 for none.
    busy_s : float
        How long clients work and faults happen; then all is healed and must come to rest.
    latency_s, spike_s, spike : float
        Mean of a message's way, mean of an exceptionally long one, and its chance.
    reset : float
        Chance that a message meets a connection that has just broken.
    duplicate : float
        Chance that a call is executed twice.
    flip : float
        Chance that one bit of a Get or Put message changes on the way.
    think_s, calm_s : float
        Mean time between two actions of one client, and between two faults.
    """

    nodes: int
    clients: int
    pages: int
    policy: str
    spill: int
    busy_s: float
    latency_s: float
    spike_s: float
    spike: float
    reset: float
    duplicate: float
    flip: float
    think_s: float
    calm_s: float


def draw(seed: int) -> Knobs:
    """The knobs of a seed."""
    rng = random.Random(f"knobs {seed}")
    return Knobs(
        nodes=rng.randint(1, 3),
        clients=rng.randint(1, 2),
        pages=rng.choice((16, 24, 48)),
        policy=rng.choice([name for name in names() if name != "opt"]),
        spill=rng.choice((0, 0, 20_000)),
        busy_s=rng.uniform(2, 6),
        latency_s=rng.choice((0.0005, 0.003, 0.02)),
        spike_s=rng.choice((0.1, 0.4, 1.5)),
        spike=rng.choice((0.0, 0.01, 0.05)),
        reset=rng.choice((0.0, 0.002, 0.02)),
        duplicate=rng.choice((0.0, 0.02, 0.1)),
        flip=rng.choice((0.0, 0.0, 0.02)),
        think_s=rng.choice((0.02, 0.08)),
        calm_s=rng.choice((0.3, 1.0, 4.0)),
    )
