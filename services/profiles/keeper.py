"""A worker's profiles: found, fetched or made, and shared, in the background. No request ever waits for any of it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kvstore.client import KvClient
from kvstore.clock import Clock, SystemClock
from kvstore.codecs import Profile, codec_class, name_of_wire_id
from kvstore.errors import ConcertinaError, NotFoundError
from services.engine.base import Engine

from . import local
from .calibrator import Command, calibrate, calibrate_command
from .claim import Claim
from .shared import PIN_S, SharedProfiles

#: Codec of new blocks until there is a profile.
FALLBACK = "int8"
#: Longest that the start waits for a profile that is on this machine to be ready for use; it goes on in the background then.
START_S = 30.0
#: Between two looks at the store for a profile that another worker may have made.
POLL_S = 5.0
#: A profile that was not found is looked for again after so long, at most `MAX_MISSING` at a time; one that could not be shared is tried
#: again after so long, and then twice as long, and so on.
RETRY_S = 30.0
MAX_MISSING = 8
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a worker wants of profiles.

    Parameters
    ----------
    model : str
        Directory of the model, to calibrate.
    codec : str
        That new blocks are to be written with.
    options : dict
        Of that codec.
    profile : Profile or None
        Given by the user, instead of what would be found or made.
    """

    model: str
    codec: str
    options: dict[str, Any] = field(default_factory=dict)
    profile: Profile | None = None

    @property
    def writes(self) -> bool:
        """Whether the codec needs a profile at all; one that does not, only reads what others wrote."""
        return codec_class(self.codec).uses_profile


class ProfileKeeper:
    """Gives profiles to an engine that has started.

    Parameters
    ----------
    engine : Engine
    wanted : Wanted
    client : KvClient or None
        Of its own; started and closed here. None for a worker without a store: it looks on this machine, and that is all.
    clock : Clock, optional
    command : callable, optional
        What calibrates.
    poll_s : float
    """

    def __init__(
        self, engine: Engine, wanted: Wanted, client: KvClient | None, clock: Clock | None = None,
        command: Command = calibrate_command, poll_s: float = POLL_S,
    ) -> None:  # fmt: skip
        self._engine, self._wanted, self._client = engine, wanted, client
        self._clock, self._command, self._poll_s = clock or SystemClock(), command, poll_s
        self._shared = SharedProfiles(client) if client else None
        self._name = ""
        self._unfit: set[str] = set()
        self._missing: dict[bytes, float] = {}
        self._tasks: set[asyncio.Task] = set()

    async def start(self) -> None:
        """Use the profile that was given, or that is on this machine; look for another, or make it, in the background.

        Raises
        ------
        ConcertinaError
            For a given profile that does not fit the model.
        """
        info, wanted = self._engine.info, self._wanted
        self._name = local.name_of(info.fingerprint, info.layout)
        if self._client:
            await self._client.start()
            self._engine.on_unknown_profile = self._look_for
        if not wanted.writes:
            return
        if wanted.profile is not None:
            local.check(wanted.profile, info.fingerprint, info.layout)
            ready = self._spawn(self._adopt(wanted.profile))
        else:
            ready = self._spawn(self._from_disk())
        await asyncio.wait({ready}, timeout=START_S)
        if ready.done():
            ready.result()
        self._spawn(self._run(ready))

    async def stop(self) -> None:
        """End what runs, a calibration too, and give everything back."""
        self._engine.on_unknown_profile = None
        tasks = set(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client:
            await self._client.close()

    async def _run(self, ready: asyncio.Task[Profile | None]) -> None:
        """See to it that there is a profile, and keep it in the store as long as this worker lives."""
        profile = await ready
        if profile is None and self._shared:
            profile = await self._obtain()
        # A profile that a user gave is found by the blocks that name it; it does not become the model's for everybody.
        names = () if self._wanted.profile else (self._name,)
        pause_s = RETRY_S
        while self._shared:
            kept = await self._shared.share(profile, names)
            await asyncio.sleep(PIN_S / 3 if kept else pause_s)
            pause_s = RETRY_S if kept else min(2 * pause_s, PIN_S / 2)

    async def _adopt(self, profile: Profile) -> Profile:
        """Write new blocks with `profile` from now on. Raises ConcertinaError where it does not fit."""
        await self._engine.use_profile(profile, self._wanted.codec, self._wanted.options, write=True)
        log.info("new blocks are written with %s, profile %s", self._wanted.codec, profile.digest.hex()[:12])
        return profile

    async def _obtain(self) -> Profile:
        """From the store, from this machine, or by calibrating; whichever comes first."""
        claim, tried = Claim(self._client.metadata, self._name, self._clock), False
        while True:
            profile = await self._found()
            if profile is None and not tried and await self._took(claim):
                tried = True
                profile = await self._make(claim)
            if profile is not None:
                return profile
            await asyncio.sleep(self._poll_s)

    async def _found(self) -> Profile | None:
        """What another worker, of this machine or another, has made meanwhile, in use."""
        return await self._from_store() or await self._from_disk()

    async def _from_store(self) -> Profile | None:
        """The profile that the store has for the model, in use and kept on this machine."""
        note = await self._shared.note(self._name)
        if note is None or note.digest in self._unfit:
            return None
        profile = await self._shared.get(note)
        if profile is None or not await self._fits(profile):
            return None
        await asyncio.to_thread(local.save, profile, self._engine.info.fingerprint, self._engine.info.layout)
        return profile

    async def _from_disk(self) -> Profile | None:
        """One that another worker of this machine has made or fetched meanwhile."""
        profile = await asyncio.to_thread(local.find, self._engine.info.fingerprint, self._engine.info.layout)
        return profile if profile is not None and await self._fits(profile) else None

    async def _fits(self, profile: Profile) -> bool:
        """Whether new blocks are written with `profile` from now on."""
        digest = profile.digest.hex()
        if digest in self._unfit:
            return False
        try:
            local.check(profile, self._engine.info.fingerprint, self._engine.info.layout)
            await self._adopt(profile)
        except ConcertinaError as error:
            log.warning("profile %s is not used: %s", digest, error)
            self._unfit.add(digest)
            return False
        return True

    async def _took(self, claim: Claim) -> bool:
        try:
            return await claim.take()
        except ConcertinaError as error:
            log.info("whether another worker calibrates is not known: %s", error)
            return False

    async def _make(self, claim: Claim) -> Profile | None:
        """Calibrate, use what comes of it and share it; unless another worker did so between our look and our claim."""
        info = self._engine.info
        keeping = self._spawn(claim.keep())
        try:
            if (profile := await self._found()) is not None:
                return profile
            log.info("calibrating %s in the background; new blocks are %s until that is done", info.model, info.codec)
            profile = await calibrate(self._wanted.model, Path(local.path_of(info.fingerprint, info.layout)), self._command)
            if not await self._fits(profile):
                return None
            await self._shared.share(profile, (self._name,))
            return profile
        except (ConcertinaError, OSError) as error:
            log.warning("no profile was made; new blocks stay %s: %s", info.codec, error)
            return None
        finally:
            keeping.cancel()
            with contextlib.suppress(ConcertinaError):
                await claim.release()

    def _look_for(self, wire_id: int, digest: bytes) -> None:
        """A block names a profile that the engine has not got. Called from the event loop."""
        now = self._clock.now()
        self._missing = {d: until for d, until in self._missing.items() if until > now}
        if digest not in self._missing and len(self._missing) < MAX_MISSING:
            self._missing[digest] = now + RETRY_S
            self._spawn(self._read_with(wire_id, digest))

    async def _read_with(self, wire_id: int, digest: bytes) -> None:
        """Find the profile with this digest, on this machine or in the store, and read blocks with it."""
        info, codec = self._engine.info, name_of_wire_id(wire_id)
        try:
            if codec is None or not codec_class(codec).uses_profile:
                raise NotFoundError(f"codec number {wire_id} is not known, or has no profiles")
            profile = await asyncio.to_thread(local.find, info.fingerprint, info.layout)
            if profile is None or profile.digest != digest:
                note = await self._shared.note(digest.hex())
                profile = await self._shared.get(note) if note and note.digest == digest.hex() else None
            if profile is None:
                raise NotFoundError("nobody has it")
            local.check(profile, info.fingerprint, info.layout)
            await self._engine.use_profile(profile, codec, {}, write=False)
        except ConcertinaError as error:
            log.info("blocks with profile %s stay misses: %s", digest.hex(), error)

    def _spawn(self, work: Coroutine) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception():
            log.error("keeping profiles failed; the worker goes on without", exc_info=task.exception())
