"""Redis as the hosts of a simulation see it: across the network, sometimes late, gone, emptied, or replaced by a stale replica."""

from __future__ import annotations

import asyncio
from typing import Any

from kvstore.errors import DeadlineError, TransportError
from kvstore.metadata import InprocMetadata, InprocState, Metadata

from .network import HostClock, Network

REDIS = "redis"


class Backend:
    """The server's side.

    Attributes
    ----------
    up : bool
        Whether it accepts connections.
    lag_s : float
        Added to each answer.
    beats : dict
        When each incarnation was last heard of.
    """

    def __init__(self, network: Network, clock: HostClock) -> None:
        self.network = network
        self.clock = clock
        self.state = InprocState()
        self.up = True
        self.lag_s = 0.0
        self.beats: dict[str, float] = {}
        self._replica = InprocState()

    def replicate(self) -> None:
        """The replica catches up."""
        self._replica = _copy(self.state)

    def fail_over(self) -> None:
        """The replica takes over as it is: what came after the last `replicate` is lost."""
        self.state = _copy(self._replica)

    def lose(self) -> None:
        """A restart without persistence."""
        self.state = InprocState()

    async def apply(self, name: str, args: tuple, options: dict) -> Any:
        """Execute one call on what the server holds now."""
        if not self.up:
            raise TransportError("Redis refused the connection")
        if name == "heartbeat":
            self.beats[args[0].incarnation] = self.network.loop.time()
        return await getattr(InprocMetadata(self.clock, self.state), name)(*args, **options)


def _copy(state: InprocState) -> InprocState:
    holders = {key: dict(places) for key, places in state.holders.items()}
    return InprocState(holders, dict(state.nodes), dict(state.workers), dict(state.values))


class RemoteMetadata:
    """The client's side: every method of `Metadata` with a deadline, as a round trip.

    A call that was given up may still be executed later, as a command that Redis had received before the connection was dropped.
    """

    def __init__(self, backend: Backend, host: str, timeout_s: float) -> None:
        self._backend = backend
        self._host = host
        self._timeout_s = timeout_s

    async def _call(self, name: str, args: tuple, options: dict) -> Any:
        trip = asyncio.ensure_future(self._trip(name, args, options))
        trip.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            async with asyncio.timeout(self._timeout_s):
                return await asyncio.shield(trip)
        except TimeoutError:
            raise DeadlineError("Redis did not answer in time") from None

    async def _trip(self, name: str, args: tuple, options: dict) -> Any:
        backend = self._backend
        await backend.network.hop(self._host, REDIS, backend.lag_s)
        answer = await backend.apply(name, args, options)
        backend.network.history.note(name, self._host)
        await backend.network.hop(REDIS, self._host)
        return answer

    async def close(self) -> None:
        """Nothing is held open."""


def _remote(name: str) -> Any:
    async def method(self: RemoteMetadata, *args: Any, **options: Any) -> Any:
        return await self._call(name, args, options)

    return method


def metadata(backend: Backend, host: str, timeout_s: float = 0.5) -> Metadata:
    """The metadata as `host` reaches it."""
    return _SimMetadata(backend, host, timeout_s)


_SimMetadata = type(
    "SimMetadata", (RemoteMetadata, Metadata), {name: _remote(name) for name in sorted(Metadata.__abstractmethods__ - {"close"})}
)
