"""Who calibrates: one worker of a cluster, by a note in the metadata that it keeps fresh.

A note is read, written and read again, so two workers that start in the same moment can, rarely, both go ahead. That costs time, not
correctness: either profile is good, and each block names its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math

from kvstore.clock import Clock
from kvstore.errors import ConcertinaError
from kvstore.metadata import Metadata

#: A note that was not renewed for so long is nobody's; it is renewed three times as often.
STALE_S = 45.0
#: Between writing and reading again: longer than another worker takes from its reading to its writing.
SETTLE_S = 0.5


class Claim:
    """The right to calibrate for `name`. `take`, `renew` and `release` raise what `Metadata` raises."""

    def __init__(self, metadata: Metadata, name: str, clock: Clock) -> None:
        self._metadata, self._name, self._clock = metadata, f"calibrating:{name}", clock
        self._owner = f"{clock.rng.getrandbits(64):016x}"

    async def take(self) -> bool:
        """Whether it is ours from now on."""
        if await self._holder() not in (None, self._owner):
            return False
        await self.renew()
        await asyncio.sleep(SETTLE_S)
        return await self._holder() == self._owner

    async def renew(self) -> None:
        """Keep it."""
        await self._write(self._clock.wall())

    async def release(self) -> None:
        """Let another worker try at once."""
        await self._write(0.0)

    async def keep(self) -> None:
        """Renew for ever; a renewal that fails is made up for by the next one."""
        while True:
            await asyncio.sleep(STALE_S / 3)
            with contextlib.suppress(ConcertinaError):
                await self.renew()

    async def _write(self, at: float) -> None:
        await self._metadata.set_value(self._name, json.dumps({"owner": self._owner, "at": at}).encode())

    async def _holder(self) -> str | None:
        """Owner of a fresh note."""
        try:
            note = json.loads(await self._metadata.get_value(self._name) or b"{}")
            owner, age_s = note["owner"], self._clock.wall() - float(note["at"])
        except (ValueError, TypeError, KeyError):
            return None
        return owner if math.fabs(age_s) < STALE_S else None
