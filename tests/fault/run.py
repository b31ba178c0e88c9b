"""One fault again and again: health, load, fault, heal, health."""

from __future__ import annotations

import asyncio
import time

from kvstore.errors import ConcertinaError, TransportError

from .base import Fault, Outcome
from .load import Load
from .system import HEALTHY_WITHIN_S, System

#: Load runs so long before the fault, so that it hits calls under way.
BEFORE_S = 0.08
PIN_S = 60
PROMPTS = 4


async def repeat(system: System, fault: Fault, repetitions: int, outcome: Outcome | None = None) -> Outcome:
    """Make `fault` so many times on a running system."""
    outcome = outcome or Outcome()
    system.way = fault.way
    began = time.monotonic()
    for _ in range(repetitions):
        await _once(system, fault, outcome)
        outcome.reps += 1
        if outcome.unhealthy:
            break  # what follows would only say that the system is not well
    outcome.seconds = time.monotonic() - began
    return outcome


async def _once(system: System, fault: Fault, outcome: Outcome) -> None:
    load = Load(system, outcome)
    if not await healthy(system, load, "before"):
        return
    for _ in range(PROMPTS):  # enough that every node has some of it
        await load.write(12)
    await load.pin(load.prompts[-PROMPTS - 1][:2] + load.prompts[-1][:2], PIN_S)
    load.start(fault.load)
    await asyncio.sleep(BEFORE_S)
    try:
        await fault.inject(system)
        await asyncio.sleep(fault.lasts_s)
    finally:
        await fault.heal(system)
        await load.stop()
    if await healthy(system, load, "after"):
        if fault.damages:
            load.pins.clear()
        await load.check_pins()


async def healthy(system: System, load: Load, when: str) -> bool:
    """Whether, within HEALTHY_WITHIN_S, all members are known, a new prompt can be written and read, and every node's account adds up."""
    deadline = time.monotonic() + HEALTHY_WITHIN_S
    try:
        await system.wait_until_members(deadline)
        while not await _readable(load, await load.write(4)):
            if time.monotonic() > deadline:
                raise TimeoutError("what was just written cannot be read")
        for record in system.living():
            await _settled(system, record, deadline)
    except (TimeoutError, ConcertinaError) as error:
        load.outcome.blame("unhealthy", f"{when}: {error}")
        return False
    return True


async def _readable(load: Load, keys: list[bytes]) -> bool:
    """Whether a prompt is whole soon: its nodes announce it a moment after they have taken it."""
    for _ in range(25):
        await asyncio.sleep(0.02)
        if await load.read(keys) == len(keys):
            return True
    return False


async def _settled(system: System, record, deadline: float) -> None:
    """Until a node has no reader's lease and no unfinished write; its sums must hold at every moment."""
    while True:
        try:
            stats = await system.account(record)
        except TransportError:
            if time.monotonic() > deadline:
                raise
            await asyncio.sleep(0.1)  # the channel's own pause after a wire that was cut may not be over
            continue
        if stats.used_bytes + stats.free_bytes + stats.reserved_bytes != stats.arena_bytes:
            raise TimeoutError(f"the account of {record.id} does not add up: {stats}")
        if not stats.leases and not stats.reserved_bytes:
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{record.id} still has {stats.leases} leases and {stats.reserved_bytes} reserved bytes")
        await asyncio.sleep(0.02)
