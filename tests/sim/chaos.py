"""What goes wrong, by name. Each fault acts on a cluster, lasts as long as it likes, and leaves it able to recover."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

from kvstore.arena import Extent

from .backend import REDIS
from .cluster import PAGE_BYTES, Cluster


def _some_node(cluster: Cluster) -> str | None:
    return cluster.rng.choice(sorted(cluster.members)) if cluster.members else None


def _some_host(cluster: Cluster) -> str:
    """A node, a client, or Redis."""
    dead = cluster.network.dead
    return cluster.rng.choice([REDIS, *(host for host in cluster.clocks if host not in dead)])


def _span(rng: random.Random) -> float:
    """How long a fault lasts: mostly short, sometimes longer than every timeout."""
    return rng.choice((0.05, 0.3, 1.0, 4.0)) * rng.uniform(0.5, 1.5)


async def crash_node(cluster: Cluster) -> None:
    """A node dies and is started again, empty and with a new incarnation."""
    if place := _some_node(cluster):
        cluster.crash(place)
        await asyncio.sleep(_span(cluster.rng))
        await cluster.start_node(place)


async def restart_node(cluster: Cluster) -> None:
    """A node drains and is started again."""
    if place := _some_node(cluster):
        await cluster.drain(place)
        await asyncio.sleep(_span(cluster.rng))
        await cluster.start_node(place)


async def steal_address(cluster: Cluster) -> None:
    """Another node gets the address of one that lives on and beats on, but is not reached any more; later that one dies."""
    place = _some_node(cluster)
    if place is None or place.startswith("thief"):
        return
    member = cluster.members[place]
    if not member.server.listens:  # it was stolen already
        return
    member.server.close()
    thief_place = f"thief{cluster.starts}-{place}"  # an earlier thief may still live, at an address of its own
    thief = await cluster.start_node(thief_place, member.server.listening)
    await asyncio.sleep(_span(cluster.rng))
    if cluster.members.get(thief_place) is thief:
        cluster.crash(thief_place)
    if cluster.members.get(place) is member:
        cluster.crash(place)
        await cluster.start_node(place)


async def partition(cluster: Cluster) -> None:
    """Two hosts do not hear each other."""
    one, other = _some_host(cluster), _some_host(cluster)
    cluster.network.cut[frozenset((one, other))] = cluster.loop.time() + _span(cluster.rng)


async def isolate(cluster: Cluster) -> None:
    """One host hears nobody."""
    one, until = _some_host(cluster), cluster.loop.time() + _span(cluster.rng)
    for other in [REDIS, *cluster.clocks]:
        cluster.network.cut[frozenset((one, other))] = until


async def freeze(cluster: Cluster) -> None:
    """A host stands still, then goes on where it was."""
    cluster.network.frozen[_some_host(cluster)] = cluster.loop.time() + _span(cluster.rng)


async def redis_down(cluster: Cluster) -> None:
    """Redis refuses connections; it comes back with its data or without."""
    cluster.backend.up = False
    await asyncio.sleep(_span(cluster.rng))
    if cluster.rng.random() < 0.5:
        cluster.backend.lose()
    cluster.backend.up = True


async def redis_loss(cluster: Cluster) -> None:
    """Redis is empty from one moment to the next."""
    cluster.backend.lose()


async def redis_failover(cluster: Cluster) -> None:
    """A replica that has not heard the last writes takes over."""
    cluster.backend.replicate()
    await asyncio.sleep(_span(cluster.rng))
    cluster.backend.fail_over()


async def redis_slow(cluster: Cluster) -> None:
    """Redis answers late, at times later than anybody waits."""
    cluster.backend.lag_s = cluster.rng.choice((0.05, 0.2, 0.6, 2.0))
    await asyncio.sleep(_span(cluster.rng))
    cluster.backend.lag_s = 0.0


async def redis_clock(cluster: Cluster) -> None:
    """Redis' clock is set forward: whatever expires, expires."""
    cluster.backend.clock.ahead_s += cluster.rng.choice((1.0, 10.0))


async def clock_forward(cluster: Cluster) -> None:
    """A host's clock is ahead, as after a suspend."""
    host = cluster.rng.choice(list(cluster.clocks))
    cluster.clocks[host].ahead_s += cluster.rng.choice((0.5, 5.0, 1000.0))


async def wall_clock(cluster: Cluster) -> None:
    """The time of day of a place is wrong from now on, for what starts there later, too."""
    host = cluster.rng.choice(list(cluster.clocks))
    cluster.clocks[host].wrong_s += cluster.rng.choice((-1e5, -3.0, 3.0, 1e5))


async def flip_in_arena(cluster: Cluster) -> None:
    """One bit of a node's memory changes."""
    place = _some_node(cluster)
    if place is None or not cluster.knobs.flip:
        return
    member = cluster.members[place]
    page, at = [Extent(cluster.rng.randrange(cluster.knobs.pages), 1)], cluster.rng.randrange(PAGE_BYTES)
    (before,) = member.node.arena.read(page, at, 1)
    member.node.arena.write(page, at, bytes([before[0] ^ 1 << cluster.rng.randrange(8)]))
    member.damaged = True
    cluster.history.flips += 1


#: Fault -> how to make it.
CHAOS: dict[str, Callable[[Cluster], Awaitable[None]]] = {
    "crash node": crash_node,
    "restart node": restart_node,
    "steal address": steal_address,
    "partition": partition,
    "isolate": isolate,
    "freeze": freeze,
    "redis down": redis_down,
    "redis loss": redis_loss,
    "redis failover": redis_failover,
    "redis slow": redis_slow,
    "redis clock": redis_clock,
    "clock forward": clock_forward,
    "wall clock": wall_clock,
    "flip in arena": flip_in_arena,
}


async def reign(cluster: Cluster) -> None:
    """Make faults at random times until cancelled; several may be under way. Those under way end in their own time."""
    rng = cluster.rng
    running: list[asyncio.Task] = []
    try:
        while True:
            await asyncio.sleep(rng.expovariate(1 / cluster.knobs.calm_s))
            name = rng.choice(list(CHAOS))
            cluster.history.note("fault", name)
            running.append(asyncio.create_task(CHAOS[name](cluster), name=name))
    finally:
        await asyncio.gather(*running, return_exceptions=True)
        for fault in running:
            if error := fault.exception():
                cluster.history.violation(f"the fault {fault.get_name()!r} failed itself: {error!r}")


def heal(cluster: Cluster) -> None:
    """End what lasts."""
    cluster.network.cut.clear()
    cluster.network.frozen.clear()
    cluster.backend.up = True
    cluster.backend.lag_s = 0.0
