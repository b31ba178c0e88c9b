"""Faults of Redis: gone, standing still, emptied, replaced, late, full, read-only, or answering with something else."""

from __future__ import annotations

import asyncio
import os
import signal

import redis

from .base import Fault
from .proxy import Rule
from .system import System


class Kill(Fault):
    """SIGKILL; an empty one comes back on the same port."""

    async def inject(self, system: System) -> None:
        system.redis.process.kill()
        system.redis.process.wait()

    async def heal(self, system: System) -> None:
        system.redis = await asyncio.to_thread(system.new_valkey, system.redis.port)


class Stop(Fault):
    """SIGSTOP, then SIGCONT: all that was asked meanwhile is answered late."""

    lasts_s = 0.8

    async def inject(self, system: System) -> None:
        os.kill(system.redis.pid, signal.SIGSTOP)

    async def heal(self, system: System) -> None:
        os.kill(system.redis.pid, signal.SIGCONT)


class Command(Fault):
    """Something that an operator, or a memory limit, does to the server.

    Parameters
    ----------
    inject, heal : tuple of str
        Commands that do it and undo it.
    """

    def __init__(self, inject: tuple[str, ...], heal: tuple[str, ...] = ()) -> None:
        self._commands = inject, heal

    async def inject(self, system: System) -> None:
        await asyncio.to_thread(_execute, system.redis.port, self._commands[0])

    async def heal(self, system: System) -> None:
        if self._commands[1]:
            await asyncio.to_thread(_execute, system.redis.port, self._commands[1])


class FailOver(Fault):
    """Another server takes over: an empty one, or a replica that has not heard the last writes.

    Parameters
    ----------
    stale : bool
    """

    def __init__(self, stale: bool) -> None:
        self._stale = stale

    async def inject(self, system: System) -> None:
        other = await asyncio.to_thread(system.new_valkey)
        if self._stale:
            await asyncio.to_thread(_execute, other.port, ("REPLICAOF", "127.0.0.1", str(system.redis.port)))
            await asyncio.to_thread(_until_synced, other.port)
            await asyncio.to_thread(_execute, other.port, ("REPLICAOF", "NO", "ONE"))
            await asyncio.sleep(0.2)  # what is written now is lost
        self._old, system.redis = system.redis, other
        system.redis_proxy.target = ("127.0.0.1", other.port)
        system.redis_proxy.cut()

    async def heal(self, system: System) -> None:
        self._old.stop()


class Between(Fault):
    """What passes between Redis and everybody else is spoiled.

    Parameters
    ----------
    rule : Rule
        As of `proxy`.
    lasts_s : float
    """

    def __init__(self, rule: Rule, lasts_s: float = 0.6) -> None:
        self._rule = rule
        self.lasts_s = lasts_s

    async def inject(self, system: System) -> None:
        system.redis_proxy.rule = self._rule

    async def heal(self, system: System) -> None:
        system.redis_proxy.heal()


class Refuse(Fault):
    """Every connection is broken, and every new one refused."""

    async def inject(self, system: System) -> None:
        system.redis_proxy.refusing = True
        system.redis_proxy.cut()

    async def heal(self, system: System) -> None:
        system.redis_proxy.heal()


def _execute(port: int, command: tuple[str, ...]) -> None:
    with redis.Redis(port=port) as server:
        server.execute_command(*command)


def _until_synced(port: int) -> None:
    with redis.Redis(port=port) as server:
        while server.info("replication").get("master_link_status") != "up":
            pass
