"""Metadata in Redis ≥ 6.2, Valkey, or a Redis Cluster: soft state in small strings.

Keys, with the prefix ``concertina``::

    concertina:b:<block key>   holders; the key is its 32 bytes as they are
    concertina:nodes           set of incarnations                       concertina:workers      set of worker ids
    concertina:n:<incarnation> JSON of NodeRecord, expires by itself     concertina:w:<id>       JSON of WorkerRecord, expires
    concertina:m:<inc>:<i>     one marker on each shard of a cluster, so that a node notices when one shard lost its state
    concertina:v:<name>        small values
    concertina:c:<block key>   somebody is about to write this block, expires by itself

Holders are packed: 8 bytes of incarnation, size u32, fidelity u8, 13 bytes each, at most four of them: about 105 bytes of Redis's
memory for a block with one holder. One server finds 256 blocks by one MGET, at a quarter of the cost of as many commands; on a
cluster, where a command must stay in one slot, blocks spread over all slots and each is a GET of its own. Scripts touch only the
keys that they were given.

An ACL user needs ``~concertina:*`` and GET MGET SET DEL SCAN SADD SREM SMEMBERS EVAL EVALSHA SCRIPT|LOAD, on a cluster also
CLUSTER|SLOTS and ASKING.
"""

from __future__ import annotations

import itertools
import json
import re
import struct
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha1
from typing import Any, TypeVar

from kvstore.errors import ConfigError, InvalidInputError, TransportError
from kvstore.identity import DIGEST_BYTES

from .base import (
    MAX_HOLDERS,
    NODE_TTL_S,
    IndexEntry,
    Location,
    Metadata,
    NodeRecord,
    WorkerRecord,
    check_incarnation,
    check_keys,
    check_value,
    newest_by_place,
)
from .resp import Endpoint, pack
from .shards import Shards

#: Blocks announced or withdrawn in one round trip, and looked up in one.
WRITE_BATCH = 512
READ_BATCH = 8192
#: Blocks that one MGET reads and one call of a script changes: Redis does nothing else meanwhile.
MGET_KEYS = 256
SCRIPT_KEYS = 64
MAX_RECORD_BYTES = 8192

#: A cursor of `scan` counts shards above Redis's own cursor of 64 bits.
_SHARD_SHIFT = 64
_HOLDER = struct.Struct("<8sIB")
_PLACE = struct.Struct("<IB")

# ARGV[1] incarnation (8 bytes); then for each key size and fidelity (5 bytes).
# Puts the holder in front of at most three others. Returns the number of blocks.
_ANNOUNCE = b"""
for i, key in ipairs(KEYS) do
  local value = ARGV[1] .. ARGV[i + 1]
  local old = redis.call('GET', key) or ''
  for at = 1, math.min(#old, 52) - 12, 13 do
    if #value < 52 and string.sub(old, at, at + 7) ~= ARGV[1] then
      value = value .. string.sub(old, at, at + 12)
    end
  end
  redis.call('SET', key, value)
end
return #KEYS
"""

# ARGV[1] incarnation (8 bytes). Removes that holder of each key, and the key with its last one.
# Returns the number of holders removed.
_WITHDRAW = b"""
local removed = 0
for _, key in ipairs(KEYS) do
  local old = redis.call('GET', key)
  if old then
    local value = ''
    for at = 1, #old - 12, 13 do
      if string.sub(old, at, at + 7) == ARGV[1] then
        removed = removed + 1
      else
        value = value .. string.sub(old, at, at + 12)
      end
    end
    if value == '' then
      redis.call('DEL', key)
    elseif value ~= old then
      redis.call('SET', key, value)
    end
  end
end
return removed
"""

T = TypeVar("T")
Record = TypeVar("Record", NodeRecord, WorkerRecord)


class RedisMetadata(Metadata):
    """See `Metadata` for the contract and the module for the keys.

    Parameters
    ----------
    url : str
        ``redis://``, ``rediss://`` or ``unix://``; of a cluster, any member.
    prefix : str
        Start of every key. No braces: they would put all keys into one slot.
    timeout_s : float
        Deadline of each round trip, connecting included.
    """

    def __init__(self, url: str, prefix: str = "concertina", timeout_s: float = 0.8) -> None:
        if not prefix or not prefix.isprintable() or set(prefix) & set("{} "):
            raise ConfigError(f"prefix {prefix!r} must not be empty nor have braces or spaces")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s must be above 0, not {timeout_s}")
        self._prefix = prefix.encode()
        scripts = [pack("SCRIPT", "LOAD", text) for text in (_ANNOUNCE, _WITHDRAW)]
        self.shards = Shards(Endpoint.from_url(url), timeout_s, scripts)
        name = self._block_name(bytes(DIGEST_BYTES))
        # A block's name as a word of a command, but for the block key that ends it.
        self._word = b"\r\n$%d\r\n%s" % (len(name), name[:-DIGEST_BYTES])

    async def announce(self, incarnation: str, entries: Sequence[IndexEntry]) -> None:
        own = check_incarnation(incarnation)
        check_keys(entry.key for entry in entries)
        for batch in _batches(entries, WRITE_BATCH):
            places = [_PLACE.pack(min(entry.size_bytes, 0xFFFFFFFF), min(entry.fidelity, 255)) for entry in batch]
            await self._run_script(_ANNOUNCE, own, [entry.key for entry in batch], places)

    async def withdraw(self, incarnation: str, keys: Sequence[bytes]) -> None:
        own = check_incarnation(incarnation)
        check_keys(keys)
        for batch in _batches(keys, WRITE_BATCH):
            await self._run_script(_WITHDRAW, own, batch)

    async def _run_script(self, script: bytes, own: bytes, keys: Sequence[bytes], args: Sequence[bytes] = ()) -> None:
        """Run `script` on the blocks `keys`, all in one round trip; loads it again where the server forgot it."""
        digest = sha1(script).hexdigest()
        names = list(map(self._block_name, keys))
        together = 1 if await self.shards.primaries() else SCRIPT_KEYS
        calls = [(part[0], [len(part), *part, own, *args[at : at + len(part)]]) for at, part in _parts(names, together)]
        replies = await self._run((name, pack("EVALSHA", digest, *words)) for name, words in calls)
        again = [call for call, reply in zip(calls, replies, strict=True) if isinstance(reply, Exception)]
        if again:
            await self._run((name, pack("EVAL", script, *words)) for name, words in again)

    async def _run(self, commands: Iterable[tuple[bytes, bytes]]) -> list[Any]:
        """The replies to pairs of key and packed command."""
        keys, packed = zip(*commands, strict=True)
        return await self.shards.run(packed, keys)

    async def locate(self, keys: Sequence[bytes]) -> list[tuple[Location, ...]]:
        check_keys(keys)
        found: list[tuple[Location, ...]] = []
        known: dict[bytes, tuple[Location, ...]] = {}
        clustered = bool(await self.shards.primaries())
        for batch in _batches(keys, READ_BATCH):
            for value in await (self._get_each(batch) if clustered else self._get_together(batch)):
                places = known.get(value) if isinstance(value, bytes) else ()
                if places is None:  # blocks of one size on one node have equal values: most are unpacked once
                    places = known[value] = _locations(value)
                found.append(places)
        return found

    async def _get_together(self, keys: Sequence[bytes]) -> list[Any]:
        """The values of blocks from the one server. The words are joined, not packed one by one, ten times as fast."""
        word, parts = self._word, [part for _, part in _parts(keys, MGET_KEYS)]
        packed = [b"*%d\r\n$4\r\nMGET%s%s\r\n" % (len(part) + 1, word, word.join(part)) for part in parts]
        replies = await self.shards.run(packed, ())
        if [len(reply) if isinstance(reply, list) else -1 for reply in replies] != list(map(len, parts)):
            raise TransportError("Redis answered MGET with another number of values")
        return list(itertools.chain.from_iterable(replies))

    async def _get_each(self, keys: Sequence[bytes]) -> list[Any]:
        """The values of blocks from all shards of a cluster."""
        packed = [b"*2\r\n$3\r\nGET%s%s\r\n" % (self._word, key) for key in keys]
        return await self.shards.run(packed, [self._block_name(key) for key in keys])

    async def scan(self, cursor: int, limit: int) -> tuple[list[tuple[bytes, tuple[Location, ...]]], int]:
        shard, at = divmod(cursor, 1 << _SHARD_SHIFT)
        servers = await self.shards.primaries() or [self.shards.endpoint]
        if shard >= len(servers):  # the cluster has fewer than when the walk began
            return [], 0
        pattern = re.sub(rb"([*?\[\]\\^])", rb"\\\1", self._block_name(b"")) + b"*"
        at, names = _page(await self.shards.ask(servers[shard], pack("SCAN", at, "MATCH", pattern, "COUNT", limit)))
        keys = [name[-DIGEST_BYTES:] for name in names if len(name) == len(self._block_name(b"")) + DIGEST_BYTES]
        entries = [(key, places) for key, places in zip(keys, await self.locate(keys), strict=True) if places]
        if not at:
            shard = (shard + 1) % len(servers)
        return entries, shard << _SHARD_SHIFT | at

    async def heartbeat(self, record: NodeRecord, ttl_s: float = NODE_TTL_S) -> bool:
        check_incarnation(record.incarnation)
        value, ttl_ms = _json(record), max(1, int(ttl_s * 1000))
        own = self._key("n", record.incarnation)
        beats = [(own, pack("SET", own, value, "PX", ttl_ms, "GET"))]
        for marker in await self._markers(record.incarnation):
            beats.append((marker, pack("SET", marker, b"1", "PX", ttl_ms, "GET")))
        members = self._key("nodes")
        replies = await self._run([*beats, (members, pack("SADD", members, record.incarnation))])
        return None not in replies[: len(beats)]

    async def _markers(self, incarnation: str) -> list[bytes]:
        """One key on every shard that does not hold the node's own; none where there is no cluster."""
        missing = set(await self.shards.primaries())
        missing.discard(self.shards.owner_of(self._key("n", incarnation)))
        markers = []
        for number in itertools.count():
            if not missing:
                return markers
            marker = self._key("m", incarnation, str(number))
            owner = self.shards.owner_of(marker)
            if owner in missing:
                missing.discard(owner)
                markers.append(marker)

    async def leave(self, record: NodeRecord) -> None:
        await self._forget("nodes", "n", [record.incarnation])

    async def nodes(self) -> list[NodeRecord]:
        return newest_by_place(await self._members("nodes", "n", NodeRecord))

    async def heartbeat_worker(self, record: WorkerRecord, ttl_s: float = NODE_TTL_S) -> None:
        own, members = self._key("w", record.id), self._key("workers")
        beat = pack("SET", own, _json(record), "PX", max(1, int(ttl_s * 1000)))
        await self._run([(own, beat), (members, pack("SADD", members, record.id))])

    async def leave_worker(self, worker_id: str) -> None:
        await self._forget("workers", "w", [worker_id])

    async def workers(self) -> list[WorkerRecord]:
        return sorted(await self._members("workers", "w", WorkerRecord), key=lambda r: r.id)

    async def _members(self, group: str, kind: str, record: type[Record]) -> list[Record]:
        """The unexpired records of a set of ids; ids whose record has expired leave the set."""
        members = self._key(group)
        (ids,) = await self._run([(members, pack("SMEMBERS", members))])
        keys = [self._key(kind, i.decode(errors="replace")) for i in ids]
        values = await self._run([(key, pack("GET", key)) for key in keys]) if keys else []
        if gone := [i for i, value in zip(ids, values, strict=True) if value is None]:
            await self._run([(members, pack("SREM", members, *gone))])
        return [parsed for value in values if (parsed := _parse(value, record)) is not None]

    async def _forget(self, group: str, kind: str, ids: list[str]) -> None:
        members, keys = self._key(group), [self._key(kind, i) for i in ids]
        await self._run([(members, pack("SREM", members, *ids)), *((k, pack("DEL", k)) for k in keys)])

    async def set_value(self, name: str, value: bytes, ttl_s: float | None = None) -> None:
        check_value(name, value)
        key = self._key("v", name)
        expiry = () if ttl_s is None else ("PX", max(1, int(ttl_s * 1000)))
        await self._run([(key, pack("SET", key, bytes(value), *expiry))])

    async def get_value(self, name: str) -> bytes | None:
        key = self._key("v", name)
        (value,) = await self._run([(key, pack("GET", key))])
        return value

    async def claim(self, keys: Sequence[bytes], ttl_s: float) -> list[bool]:
        check_keys(keys)
        names, ttl_ms = [self._claim_name(key) for key in keys], max(1, int(ttl_s * 1000))
        return [reply is not None for reply in await self._run((name, pack("SET", name, b"1", "NX", "PX", ttl_ms)) for name in names)]

    async def unclaim(self, keys: Sequence[bytes]) -> None:
        check_keys(keys)
        names = [self._claim_name(key) for key in keys]
        await self._run((name, pack("DEL", name)) for name in names)

    async def close(self) -> None:
        await self.shards.close()

    def _claim_name(self, key: bytes) -> bytes:
        return b"%s:c:%s" % (self._prefix, key.hex().encode())

    def _block_name(self, key: bytes) -> bytes:
        return b"%s:b:%s" % (self._prefix, key)

    def _key(self, *words: str) -> bytes:
        return b":".join((self._prefix, *(w.encode() for w in words)))


def _parts(items: Sequence[T], size: int) -> Iterator[tuple[int, Sequence[T]]]:
    """Runs of at most `size` items, each with the place where it begins."""
    for at in range(0, len(items), size):
        yield at, items[at : at + size]


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (part for _, part in _parts(items, size))


def _locations(value: Any) -> tuple[Location, ...]:
    """Unpack a field's value; anything that we did not write is no holder."""
    if not isinstance(value, bytes) or not value or len(value) % _HOLDER.size or len(value) > MAX_HOLDERS * _HOLDER.size:
        return ()
    return tuple(Location(own.hex(), size, fidelity) for own, size, fidelity in _HOLDER.iter_unpack(value))


def _page(reply: Any) -> tuple[int, list[bytes]]:
    """Cursor and names of a reply to SCAN. Raises TransportError where it is none."""
    match reply:
        case [bytes(cursor), list(names)] if cursor.isdigit() and all(isinstance(name, bytes) for name in names):
            return int(cursor) & (1 << _SHARD_SHIFT) - 1, names
    raise TransportError("Redis answered SCAN with something else")


def _json(record: NodeRecord | WorkerRecord) -> bytes:
    value = json.dumps(record.to_dict(), separators=(",", ":")).encode()
    if len(value) > MAX_RECORD_BYTES:
        raise InvalidInputError(f"a member's record may have {MAX_RECORD_BYTES} bytes, not {len(value)}; shorten its names")
    return value


def _parse(value: Any, record: type[Record]) -> Record | None:
    """The record in `value`; None for what is expired or was not written by us."""
    if not isinstance(value, bytes) or len(value) > MAX_RECORD_BYTES:
        return None
    try:
        return record.from_dict(json.loads(value))
    except (ValueError, RecursionError, InvalidInputError):
        return None
