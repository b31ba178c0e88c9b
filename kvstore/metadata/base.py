"""The contract of the cluster's metadata: which node holds which block, and who is alive (DESIGN §7).

All of it is soft state. A node announces its blocks and beats; whoever reads it treats an entry whose incarnation is not that of
a living node as absent. Losing everything costs hits until the nodes have announced again, never a wrong answer.

A block's parent is not in the index: it would cost as much as two more holders, and the reader has just computed the whole chain
from its tokens, so it checks the parent in the block's own header.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, NamedTuple, Self

from kvstore.errors import InvalidInputError
from kvstore.identity import DIGEST_BYTES

INCARNATION_BYTES = 8
#: Holders of one block that the index remembers; more copies than this may exist, unlisted.
MAX_HOLDERS = 4
#: Bound of a value kept by `Metadata.set_value`.
MAX_VALUE_BYTES = 64 << 10
#: A node that was silent for so long is dead; a reader that reads the membership every 0.5 s knows it within 3 s.
NODE_TTL_S = 2.25


class _Record:
    """Conversion to and from plain dicts; unknown keys of a newer version are ignored."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Raises InvalidInputError where a field is missing or of another type."""
        known = {f.name: f.type for f in fields(cls)}  # type: ignore[arg-type]
        if not isinstance(values, dict):
            raise InvalidInputError(f"a {cls.__name__} must be an object, not {type(values).__name__}")
        try:
            record = cls(**{name: value for name, value in values.items() if name in known})
        except TypeError as error:
            raise InvalidInputError(f"incomplete {cls.__name__}: {error}") from None
        for name, kind in known.items():
            if not _is_a(getattr(record, name), kind):
                raise InvalidInputError(f"{cls.__name__}.{name} must be {kind}, not {getattr(record, name)!r}")
        return record


def _is_a(value: object, kind: str) -> bool:
    """Whether `value` fits an annotation among ``str``, ``int``, ``float`` and ``str | None``."""
    allowed = {"str": (str,), "int": (int,), "float": (int, float), "str | None": (str, type(None))}[kind]
    return isinstance(value, allowed) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True)
class NodeRecord(_Record):
    """What a node says of itself with every heartbeat.

    Parameters
    ----------
    id : str
        Name of the node, stable over restarts.
    incarnation : str
        16 hexadecimal digits, drawn at its start.
    address : str
        ``host:port`` of its gRPC service.
    metrics : str or None
        ``host:port`` of its metrics page.
    device : str
        ``cpu`` or ``cuda:N``.
    host : str
        Identity of the machine; readers on the same one may copy from shared memory.
    started : float
        Seconds since the epoch.
    door : str
        ``host:port`` of its `kvstore.door`; empty where only gRPC is served.
    pressure : str
        `kvstore.eviction.cluster.Pressure` as text: the node's bytes by value.
    readers : float
        Reads under way at one time, averaged over the last seconds.
    usage : str
        JSON object: bytes held by each tenant or namespace that has a quota.
    beat : int
        Number of the heartbeat: a report that says the same as the one before is a new one all the same.
    """

    id: str
    incarnation: str
    address: str
    metrics: str | None = None
    pid: int = 0
    device: str = "cpu"
    arena_bytes: int = 0
    used_bytes: int = 0
    blocks: int = 0
    host: str = ""
    started: float = 0.0
    door: str = ""
    pressure: str = ""
    readers: float = 0.0
    usage: str = ""
    beat: int = 0


@dataclass(frozen=True, slots=True)
class WorkerRecord(_Record):
    """What a worker says of itself with every heartbeat; `address` is its gRPC, `http` its HTTP endpoint."""

    id: str
    address: str
    http: str | None = None
    metrics: str | None = None
    pid: int = 0
    engine: str = ""
    device: str = "cpu"
    model: str = ""
    codec: str = ""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One block that a node holds: 32-byte key, stored bytes (header included), layers of precision present."""

    key: bytes
    size_bytes: int
    fidelity: int


class Location(NamedTuple):
    """One holder of a block: `incarnation` is 16 hexadecimal digits. A tuple, since a lookup makes thousands."""

    incarnation: str
    size_bytes: int
    fidelity: int


class Metadata(ABC):
    """Index and membership. Every call has a deadline of its own.

    Raises
    ------
    TransportError, DeadlineError
        From every method, when the backend is away or slow. Never hangs.
    InvalidInputError
        For a key that is not 32 bytes or an incarnation that is not 16 hexadecimal digits.
    """

    @abstractmethod
    async def announce(self, incarnation: str, entries: Sequence[IndexEntry]) -> None:
        """Say that `incarnation` holds these blocks; replaces what it said of them before. Any number; sent in bounded batches."""

    @abstractmethod
    async def withdraw(self, incarnation: str, keys: Sequence[bytes]) -> None:
        """Say that `incarnation` no longer holds these blocks. Also how a reader tidies away entries of a dead incarnation."""

    @abstractmethod
    async def locate(self, keys: Sequence[bytes]) -> list[tuple[Location, ...]]:
        """The announced holders of each key, dead ones included, in the order of `keys`; one round trip for thousands."""

    @abstractmethod
    async def scan(self, cursor: int, limit: int) -> tuple[list[tuple[bytes, tuple[Location, ...]]], int]:
        """A part of the whole index, to find what nobody looks up any more.

        Parameters
        ----------
        cursor : int
            0 to begin, then what the call before returned.
        limit : int
            Blocks to look at, about.

        Returns
        -------
        list of (key, holders), int
            And the next cursor, 0 after the last part. Entries that change meanwhile may be missed, or found twice.
        """

    @abstractmethod
    async def heartbeat(self, record: NodeRecord, ttl_s: float = NODE_TTL_S) -> bool:
        """Keep a node alive for `ttl_s` seconds.

        Returns
        -------
        bool
            False when nothing is known of an earlier beat of this incarnation: at its first beat, after a silence longer than the
            time to live, and when the backend lost its state. The node must then announce all its blocks.
        """

    @abstractmethod
    async def leave(self, record: NodeRecord) -> None:
        """End the membership at once. The node withdraws its entries itself."""

    @abstractmethod
    async def nodes(self) -> list[NodeRecord]:
        """The living nodes, by id. Of a restarted node (same id and address) only the newest incarnation."""

    @abstractmethod
    async def heartbeat_worker(self, record: WorkerRecord, ttl_s: float = NODE_TTL_S) -> None:
        """Keep a worker listed for `ttl_s` seconds."""

    @abstractmethod
    async def leave_worker(self, worker_id: str) -> None:
        """Unlist a worker at once."""

    @abstractmethod
    async def workers(self) -> list[WorkerRecord]:
        """The living workers, by id."""

    @abstractmethod
    async def set_value(self, name: str, value: bytes, ttl_s: float | None = None) -> None:
        """Remember a small named value, such as the digest of a model's profile, for `ttl_s` seconds where given.

        Raises InvalidInputError above MAX_VALUE_BYTES.
        """

    @abstractmethod
    async def get_value(self, name: str) -> bytes | None:
        """The value of `name`, or None."""

    @abstractmethod
    async def claim(self, keys: Sequence[bytes], ttl_s: float) -> list[bool]:
        """Claim the writing of blocks for `ttl_s` seconds: which of them nobody else has claimed. One round trip."""

    @abstractmethod
    async def unclaim(self, keys: Sequence[bytes]) -> None:
        """Give claims up: the blocks have been written, or will not be."""

    @abstractmethod
    async def close(self) -> None:
        """Give back connections. Safe to call twice."""


def check_incarnation(incarnation: str) -> bytes:
    """`incarnation` as 8 bytes. Raises InvalidInputError unless it is 16 hexadecimal digits."""
    try:
        raw = bytes.fromhex(incarnation)
    except (ValueError, TypeError):
        raw = b""
    if len(raw) != INCARNATION_BYTES or len(incarnation) != 2 * INCARNATION_BYTES:
        raise InvalidInputError(f"incarnation {incarnation!r} must be {2 * INCARNATION_BYTES} hexadecimal digits")
    return raw


def check_keys(keys: Iterable[bytes]) -> None:
    """Raises InvalidInputError unless every key is 32 bytes."""
    wrong = set(map(len, keys)) - {DIGEST_BYTES}
    if wrong:
        raise InvalidInputError(f"a block key has {DIGEST_BYTES} bytes, not {min(wrong)}; digests are never cut short")


def check_value(name: str, value: bytes) -> None:
    """Raises InvalidInputError for an empty name or a value above the bound."""
    if not name or len(value) > MAX_VALUE_BYTES:
        raise InvalidInputError(f"value {name!r} needs a name and at most {MAX_VALUE_BYTES} bytes, not {len(value)}")


def newest_by_place(records: Iterable[NodeRecord]) -> list[NodeRecord]:
    """One record for each id and address, the latest started, ordered by id."""
    newest: dict[tuple[str, str], NodeRecord] = {}
    for record in sorted(records, key=lambda r: (r.started, r.incarnation)):
        newest[record.id, record.address] = record
    return sorted(newest.values(), key=lambda r: (r.id, r.address))
