"""Time and messages between hosts: latency, spikes, broken connections, partitions, hosts that stand still or are gone."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field, replace

from kvstore.errors import TransportError

from .history import History
from .knobs import Knobs
from .loop import VirtualLoop


class HostClock:
    """One host's clock: it runs with the loop, and can be set forward (`now`, as after a suspend) or anywhere (`wall`)."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.rng = random.Random(name)
        self.ahead_s = 0.0
        self.wrong_s = 0.0
        self._loop = loop

    def now(self) -> float:
        return self._loop.time() + self.ahead_s

    def wall(self) -> float:
        return 1e9 + self._loop.time() + self.wrong_s


@dataclass(slots=True)
class Network:
    """What lies between the hosts.

    Attributes
    ----------
    cut : dict
        Pairs of hosts that cannot hear each other, with the end of the cut.
    frozen : dict
        Hosts that stand still, with the time at which they go on.
    dead : set
        Hosts that are gone: who calls them hears nothing, or at once that nobody listens.
    """

    loop: VirtualLoop
    knobs: Knobs
    rng: random.Random
    history: History
    cut: dict[frozenset[str], float] = field(default_factory=dict)
    frozen: dict[str, float] = field(default_factory=dict)
    dead: set[str] = field(default_factory=set)

    async def hop(self, source: str, target: str, extra_s: float = 0.0) -> None:
        """One message's way. Raises TransportError when the connection breaks under it; a message into a cut waits for its end."""
        knobs, rng = self.knobs, self.rng
        chance = rng.random()
        mean = knobs.spike_s if chance < knobs.spike else knobs.latency_s
        await asyncio.sleep(rng.expovariate(1 / mean) + extra_s)
        while (until := self._blocked_until(source, target)) > self.loop.time():
            await asyncio.sleep(until - self.loop.time())
        if target in self.dead or source in self.dead:
            if rng.random() < 0.5:
                await asyncio.sleep(3600)  # no answer at all, not even a refusal
            raise TransportError(f"{target} refused the connection")
        if rng.random() < knobs.reset:
            self.history.note("reset", source, target)
            raise TransportError(f"the connection to {target} broke")

    def _blocked_until(self, source: str, target: str) -> float:
        return max(self.cut.get(frozenset((source, target)), 0.0), self.frozen.get(source, 0.0), self.frozen.get(target, 0.0))

    def calm(self) -> None:
        """From now on messages arrive, once, as they were sent."""
        self.knobs = replace(self.knobs, spike=0.0, reset=0.0, duplicate=0.0, flip=0.0)

    def flipped(self, message: bytes) -> bytes:
        """`message`, or seldom `message` with one bit changed."""
        if not message or self.rng.random() >= self.knobs.flip:
            return message
        self.history.flips += 1
        damaged = bytearray(message)
        damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
        return bytes(damaged)
