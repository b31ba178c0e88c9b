"""Request traces: gzipped or plain JSON lines, one request a line, in order of arrival (DESIGN §8).

``{"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [id, …]}``; ``hash_ids[j]`` is a chained prefix hash
that names prompt tokens [0, 512 (j + 1)), so an id has one parent and one depth. The last block may be partial.
"""

from __future__ import annotations

import gzip
import json
import zlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import InvalidInputError
from .base import BlockInfo

BLOCK_TOKENS = 512
_MAX_LINE_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request: seconds since some start, prompt length in tokens, and its blocks' numbers in the trace, root first."""

    now: float
    input_tokens: int
    blocks: array[int]


@dataclass(slots=True)
class Trace:
    """A trace with its distinct blocks numbered from 0 in order of appearance.

    Attributes
    ----------
    name : str
    requests : list of TraceRequest
    parents, depths : array of int32
        By block number; parent -1 at a root.
    partial : bytearray
        1 where the block was a prompt's last one and not full when first seen.
    """

    name: str
    requests: list[TraceRequest] = field(default_factory=list)
    parents: array[int] = field(default_factory=lambda: array("i"))
    depths: array[int] = field(default_factory=lambda: array("i"))
    partial: bytearray = field(default_factory=bytearray)

    @property
    def distinct_blocks(self) -> int:
        return len(self.parents)

    @property
    def references(self) -> int:
        """Block references: blocks summed over requests."""
        return sum(len(request.blocks) for request in self.requests)

    @property
    def tokens(self) -> int:
        """Prompt tokens of all requests."""
        return sum(request.input_tokens for request in self.requests)

    def infos(self, sizes: tuple[int, ...], losses: tuple[float, ...]) -> list[BlockInfo]:
        """Every block as a policy sees it, with the trace's number as its id, by number."""
        return [
            BlockInfo(number, None if parent < 0 else parent, depth, sizes, losses, bool(partial))
            for number, (parent, depth, partial) in enumerate(zip(self.parents, self.depths, self.partial, strict=True))
        ]

    def part(self, start: int, stop: int) -> Trace:
        """Requests `start` to `stop` as a trace of their own."""
        requests = ((request.now, request.input_tokens, request.blocks) for request in self.requests[start:stop])
        return Trace.of(f"{self.name}[{start}:{stop}]", requests)

    @classmethod
    def of(cls, name: str, requests: Iterable[tuple[float, int, Iterable[Any]]]) -> Trace:
        """From seconds, prompt tokens and block ids of each request. Raises ValueError for ids that are no chained prefix hashes."""
        builder = _Builder(name)
        for now, input_tokens, ids in requests:
            builder.add(now, input_tokens, ids)
        return builder.trace


class _Builder:
    def __init__(self, name: str) -> None:
        self.trace = Trace(name)
        self._numbers: dict[Any, int] = {}

    def add(self, now: float, input_tokens: int, ids: Iterable[Any]) -> None:
        trace, numbers, parent, row = self.trace, self._numbers, -1, array("i")
        for depth, id in enumerate(ids):
            number = numbers.get(id)
            if number is None:
                number = numbers[id] = len(trace.parents)
                trace.parents.append(parent)
                trace.depths.append(depth)
                trace.partial.append(0)
            elif trace.parents[number] != parent or trace.depths[number] != depth:
                raise ValueError(f"block {id!r} stood after another parent before: hash_ids must be chained prefix hashes")
            row.append(number)
            parent = number
        if row and input_tokens % BLOCK_TOKENS and row[-1] == len(trace.parents) - 1:
            trace.partial[row[-1]] = 1
        if trace.requests:
            now = max(now, trace.requests[-1].now)
        trace.requests.append(TraceRequest(now, input_tokens, row))


def read_trace(path: str | Path, limit: int | None = None) -> Trace:
    """Read the trace at `path`, at most its first `limit` requests.

    Raises
    ------
    InvalidInputError
        For a file that cannot be read, and for a line that is no request; the message names the line.
    """
    path = Path(path)
    builder = _Builder(path.name)
    number = 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            while line := file.readline(_MAX_LINE_BYTES):
                number += 1
                if line.strip():
                    builder.add(*_parse(line))
                if limit is not None and len(builder.trace.requests) >= limit:
                    break
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(f"cannot read the trace {path} after line {number}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        message = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InvalidInputError(f"{path}, line {number}: no valid request: {message}") from error
    if not builder.trace.requests:
        raise InvalidInputError(f"{path} holds no request")
    return builder.trace


def _parse(line: bytes) -> tuple[float, int, list[Any]]:
    record = json.loads(line)
    if not isinstance(record, dict):
        raise ValueError("a request is a JSON object")
    timestamp, input_tokens, ids = record["timestamp"], record["input_length"], record["hash_ids"]
    if isinstance(timestamp, bool) or not isinstance(timestamp, (int, float)) or not abs(timestamp) < 1e15:
        raise ValueError("timestamp must be a number of milliseconds")
    if isinstance(input_tokens, bool) or not isinstance(input_tokens, int) or not 0 <= input_tokens < 2**40:
        raise ValueError("input_length must be a number of tokens")
    if not isinstance(ids, list) or not all(type(id) is int or type(id) is str for id in ids):
        raise ValueError("hash_ids must be a list of integers")
    return timestamp / 1000.0, input_tokens, ids
