"""Page accounting and the memory of one node's arena."""

from __future__ import annotations

from .device import MARK_BYTES, Arena, CpuArena, available_memory, create, sealed_memory
from .host import allow_open_files, give_freed_memory_back, host_identity, is_own_user, keep_freed_memory, settle_objects
from .pages import AccountingError, Extent, PageAllocator

__all__ = [
    "AccountingError",
    "Arena",
    "CpuArena",
    "Extent",
    "MARK_BYTES",
    "PageAllocator",
    "allow_open_files",
    "available_memory",
    "create",
    "host_identity",
    "give_freed_memory_back",
    "is_own_user",
    "keep_freed_memory",
    "settle_objects",
    "sealed_memory",
]
