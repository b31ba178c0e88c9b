"""Whether a block may come in at all: it must be worth what leaves for it, and within its tenant's quota."""

from __future__ import annotations

from collections.abc import Callable

from kvstore.arena.pages import PageAllocator
from kvstore.block import BlockHeader
from kvstore.clock import Clock
from kvstore.codecs import PROFILE_WIRE_ID
from kvstore.eviction.base import BlockInfo, EvictionPolicy, Request
from kvstore.eviction.cluster import is_admitted

from .floors import FloorTable
from .quotas import QuotaTable
from .table import BlockTable, Entry, block_id, block_info


class Admission:
    """Asked before room is made for a block.

    Parameters
    ----------
    clock, policy, allocator, table
        The engine's own.
    page_bytes : int
    drop : callable
        ``drop(entry, reason)`` evicts a block.

    Attributes
    ----------
    waterline : float
        Of the cluster, as last heard; 0.0 admits everything.
    quotas : QuotaTable
    floors : FloorTable
    """

    def __init__(
        self,
        clock: Clock,
        policy: EvictionPolicy,
        allocator: PageAllocator,
        table: BlockTable,
        page_bytes: int,
        drop: Callable[[Entry, str], None],
    ) -> None:
        self.waterline = 0.0
        self.quotas = QuotaTable()
        self.floors = FloorTable()
        self._clock = clock
        self._policy = policy
        self._allocator = allocator
        self._table = table
        self._page_bytes = page_bytes
        self._drop = drop
        self._refused: tuple[bytes, int] | None = None  # the last block, and its request

    def is_open(self, header: BlockHeader, request: Request, owner: str) -> bool:
        """Whether a chain that begins with this block comes in as long as there is room that nobody has to give."""
        return not self.quotas.limits and self._refused != (block_id(owner, header.parent), request.seq)

    def refusal(self, header: BlockHeader, request: Request, owner: str, pages: int) -> str | None:
        """Why a block of `pages` is not admitted, None where it is. A tenant over its quota gives up blocks of its own first.

        What follows a block that was refused a moment ago is refused as well: without its parent it would only take room.
        """
        id, parent = block_id(owner, header.key), block_id(owner, header.parent)
        if self._refused == (parent, request.seq):
            reason = "parent"
        elif not self._is_worth(header, request, owner, pages):
            reason = "waterline"
        elif not self._fits_quota(header, owner, pages):
            return self.refused(id, request, "quota")
        else:
            return None
        if self._table.get(id) is None:  # of one that is resident, in a worse copy, the policy must not hear that it went
            self._missed(request, self.info(header, owner))
        return self.refused(id, request, reason)

    def told(self, header: BlockHeader, request: Request, owner: str) -> None:
        """A block that is not here was asked for too; it did not come, since a block before it was refused."""
        info = self.info(header, owner)
        self._missed(request, BlockInfo(info.id, info.parent, info.depth, (self._page_bytes,), (1.0,)))

    def info(self, header: BlockHeader, owner: str) -> BlockInfo:
        """The block as the policy is told of it: its ladder ends at the floor of its owner or namespace."""
        return block_info(header, self._page_bytes, owner, self.floors.fidelity(header, owner))

    def refused(self, id: bytes, request: Request, reason: str) -> str:
        """Note that the request's block was refused, by whomever; answers `reason`."""
        self._refused = id, request.seq
        return reason

    def _missed(self, request: Request, info: BlockInfo) -> None:
        """Tell the policy of a block that was asked for and is not here, so that it knows it when it comes back."""
        self._policy.access(request, [info])
        self._policy.removed(info.id)

    def _is_worth(self, header: BlockHeader, request: Request, owner: str, pages: int) -> bool:
        """Whether a block would not be the next to leave."""
        if self._allocator.free_pages >= pages or header.codec == PROFILE_WIRE_ID:
            return True
        victim, info = self._policy.victim(self._clock.now()), self.info(header, owner)
        return victim is None or is_admitted(self._policy.worth(request, info), victim.value, self.waterline)

    def _fits_quota(self, header: BlockHeader, owner: str, pages: int) -> bool:
        while subject := self.quotas.over((owner, header.namespace.hex()), pages * self._page_bytes):
            entry = self.quotas.victim(subject, self._table)
            if entry is None:
                return False
            self._drop(entry, "quota")
        return True
