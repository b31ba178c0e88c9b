"""What of a prompt a router needs to know: whether it begins as another one did. Hints, not keys: a collision costs a detour."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

from protos.concertina.inference.v1 import inference_pb2 as pb

#: Bytes of prompt that one link of a trail stands for, about 256 tokens of text.
LINK_BYTES = 1024
MAX_LINKS = 16
_SEPARATOR = ","
Holder = TypeVar("Holder", bound=Hashable)


def trail(request: pb.GenerateRequest) -> str:
    """Digests of ever longer beginnings of the prompt, as one string; empty for a prompt of less than one link."""
    digest, links = hashlib.blake2b(digest_size=8), []
    data = _beginning(request)
    for stop in range(LINK_BYTES, len(data) + 1, LINK_BYTES):
        digest.update(data[stop - LINK_BYTES : stop])
        links.append(digest.hexdigest())
    return _SEPARATOR.join(links)


def _beginning(request: pb.GenerateRequest) -> bytes:
    limit = LINK_BYTES * MAX_LINKS
    form = request.WhichOneof("prompt")
    if form == "tokens":
        return b"".join(t.to_bytes(4, "little", signed=True) for t in request.tokens.ids[: limit // 4])
    if form == "text":
        return request.text[:limit].encode()[:limit]
    parts: Iterable[str] = (f"{m.role}\0{m.content[:limit]}\0" for m in request.chat.messages[:MAX_LINKS])
    return "".join(parts).encode()[:limit]


class Memory(Generic[Holder]):
    """Who had which beginning last. Bounded: the beginnings that were not used for longest are forgotten.

    Parameters
    ----------
    limit : int
        Links that are remembered.
    """

    def __init__(self, limit: int = 16384) -> None:
        self._limit = limit
        self._holders: OrderedDict[str, Holder] = OrderedDict()

    def holder(self, trail: str) -> Holder | None:
        """Who had the longest beginning that is remembered."""
        for link in reversed(trail.split(_SEPARATOR)):
            if link in self._holders:
                self._holders.move_to_end(link)
                return self._holders[link]
        return None

    def note(self, trail: str, holder: Holder) -> None:
        """`holder` has been given the whole prompt."""
        for link in filter(None, trail.split(_SEPARATOR)):
            self._holders[link] = holder
            self._holders.move_to_end(link)
        while len(self._holders) > self._limit:
            self._holders.popitem(last=False)
