"""Profiles in the store: a note in the metadata names the file, pinned blocks on the nodes are the file."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from dataclasses import asdict, dataclass
from typing import Self

from kvstore.client import KvClient
from kvstore.codecs import Profile
from kvstore.errors import ConcertinaError, CorruptBlockError
from kvstore.identity import digest

from . import chunks

#: Pins last so long beyond their last renewal.
PIN_S = 600
#: Of the memory of all nodes, the most that one profile may take.
ARENA_SHARE = 0.25
FETCH_S = 60.0
LOOKUP_S = 2.0
FLUSH_S = 60.0
#: Longest that sharing waits until the nodes have announced what they hold, and between two looks.
LISTED_S = 10.0
LOOK_S = 0.05
_DIGEST = re.compile("[0-9a-f]{64}")
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Note:
    """Which file a name stands for.

    Parameters
    ----------
    digest, content : str
        In hex: the profile's own digest, which blocks name, and that of the file's bytes.
    size_bytes : int
    first, last : str
        Keys of the first and the last chunk, in hex.
    """

    digest: str
    content: str
    size_bytes: int
    first: str
    last: str

    @classmethod
    def of(cls, profile: Profile, data: bytes) -> Self:
        content = digest(data)
        keys = chunks.keys_of(content, len(data))
        return cls(profile.digest.hex(), content.hex(), len(data), keys[0].hex(), keys[-1].hex())

    @classmethod
    def parse(cls, text: bytes) -> Self:
        """Raises CorruptBlockError for anything that `of` cannot have made."""
        try:
            note = cls(**json.loads(text))
            texts, size = (note.digest, note.content, note.first, note.last), note.size_bytes
            good = all(isinstance(t, str) and _DIGEST.fullmatch(t) for t in texts) and type(size) is int and 1 <= size <= chunks.MAX_BYTES
        except (ValueError, TypeError, RecursionError) as error:
            raise CorruptBlockError(f"the note of a profile is damaged: {error}") from error
        if not good or (note.keys[0].hex(), note.keys[-1].hex()) != (note.first, note.last):
            raise CorruptBlockError("the note of a profile is damaged, or of another version")
        return note

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @property
    def keys(self) -> list[bytes]:
        """Of all chunks."""
        return chunks.keys_of(bytes.fromhex(self.content), self.size_bytes)


class SharedProfiles:
    """The profiles that the store holds. Sharing is for speed alone: where it fails, workers make profiles of their own.

    Parameters
    ----------
    client : KvClient
        Started and closed by its owner; not the one that publishes blocks, whose queue is not to be held up.
    """

    def __init__(self, client: KvClient) -> None:
        self._client = client
        self._notes: dict[bytes, Note] = {}

    async def share(self, profile: Profile, names: tuple[str, ...]) -> bool:
        """See to it that others find `profile` in the store under each of `names`, pinned for `PIN_S`. Call it again before that is over.

        Returns
        -------
        bool
            False where it does not fit, or the store is away.
        """
        try:
            return await self._share(profile, names)
        except ConcertinaError as error:
            log.info("the profile is not shared now: %s", error)
            return False

    async def _share(self, profile: Profile, names: tuple[str, ...]) -> bool:
        client, note = self._client, self._notes.get(profile.digest)
        if note is None:
            note = self._notes[profile.digest] = await asyncio.to_thread(lambda: Note.of(profile, profile.to_bytes()))
        room = sum(node.arena_bytes for node in client.nodes())
        if note.size_bytes > min(ARENA_SHARE * room, chunks.MAX_BYTES):
            log.info("the profile's %d bytes are too many for the %d of all nodes; it is not shared", note.size_bytes, room)
            return False
        statuses = await client.admin.pin(note.keys, PIN_S)
        if "NOT_FOUND" in statuses:
            blocks = await asyncio.to_thread(lambda: chunks.split(profile.to_bytes()))
            client.publish([block for block, status in zip(blocks, statuses, strict=True) if status == "NOT_FOUND"])
            await client.flush(FLUSH_S)
            statuses = await client.admin.pin(note.keys, PIN_S)
        if set(statuses) != {"OK"}:
            log.info("the nodes do not keep the profile (%s); it is not shared", ", ".join(sorted(set(statuses))))
            return False
        for name in (*names, note.digest):
            await client.metadata.set_value(f"profile:{name}", note.to_bytes())
        return await self._is_listed(note)

    async def _is_listed(self, note: Note) -> bool:
        """Whether readers find all chunks. Nodes announce what they hold a moment after they have it."""
        keys, until = note.keys, time.monotonic() + LISTED_S
        while len(await self._client.lookup(keys, deadline_s=LOOKUP_S)) < len(keys):
            if time.monotonic() > until:  # a lookup may take its time, too
                log.info("the nodes have not announced the profile within %.0f s; others may not find it yet", LISTED_S)
                return False
            await asyncio.sleep(LOOK_S)
        return True

    async def note(self, name: str) -> Note | None:
        """What `name`, a model's or a profile's digest in hex, stands for; None where nothing does or the metadata is away."""
        try:
            text = await self._client.metadata.get_value(f"profile:{name}")
            return Note.parse(text) if text else None
        except ConcertinaError as error:
            log.info("profile %s is not found: %s", name, error)
            return None

    async def get(self, note: Note) -> Profile | None:
        """The profile itself, verified; None where the store has not all of it any more."""
        keys, content = note.keys, bytes.fromhex(note.content)
        try:
            hits = await self._client.lookup(keys, deadline_s=LOOKUP_S)
            if len(hits) < len(keys) or sum(hit.size_bytes for hit in hits) > 2 * note.size_bytes + (1 << 20):
                return None
            fetched = await self._client.fetch(hits, namespace=chunks.namespace_of(content), deadline_s=FETCH_S)
            if len(fetched.blocks) < len(keys):
                return None
            profile = await asyncio.to_thread(lambda: Profile.from_bytes(chunks.join(fetched.blocks, content)))
            if profile.digest.hex() != note.digest:
                raise CorruptBlockError(f"profile {profile.digest.hex()} came under the name of {note.digest}")
        except ConcertinaError as error:
            log.warning("a profile in the store is of no use: %s", error)
            return None
        return profile
