"""The machine under a process: which one it is, to whom the other end of a socket belongs, how many files it may open, and how its C
library hands out large pieces of memory."""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import resource
import socket
import struct
from pathlib import Path

log = logging.getLogger(__name__)

_PEER = struct.Struct("3i")  # pid, uid, gid
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
KEPT_BYTES = 256 << 20
HEAP_PIECE_BYTES = 32 << 20
#: Heaps that threads share. With one a thread, frames leave holes in each; and of every heap but the first, glibc gives back holes alone,
#: never the free memory at its end.
HEAPS = 1
MAX_OPEN_FILES = 1 << 16


def host_identity() -> str:
    """Boot id of the kernel and number of the process namespace.

    Processes with the same answer can open each other's arenas, if they belong to the same user; containers that cannot see each
    other's processes differ.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}:{os.stat('/proc/self/ns/pid').st_ino}"


def is_own_user(peer: socket.socket) -> bool:
    """Whether the other end of a Unix socket belongs to this process's user; the kernel says so. Names and paths alone may be anybody's."""
    _, uid, _ = _PEER.unpack(peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
    if uid != os.getuid():
        log.warning("a connection with user %d is refused by user %d", uid, os.getuid())
    return uid == os.getuid()


def keep_freed_memory() -> bool:
    """Let glibc keep up to 256 MiB of freed memory, for processes that move frames of a few MiB.

    Otherwise each frame's buffers go back to the kernel and come again as page faults, which cost more than the copies: three
    quarters of the system time of a Get. For a program's main function, not for a library: it concerns the whole process.

    Returns
    -------
    bool
        False where the C library has no such setting (not glibc); nothing is changed then.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, HEAP_PIECE_BYTES), (_M_TRIM_THRESHOLD, KEPT_BYTES), (_M_ARENA_MAX, HEAPS))
    return all(mallopt(setting, value) for setting, value in settings)


def give_freed_memory_back() -> bool:
    """What `keep_freed_memory` kept goes back to the kernel, also from holes between pieces in use. For an idle process: some milliseconds.

    Otherwise each burst that is larger than all before it, or falls into other holes, leaves the resident memory a little higher.

    Returns
    -------
    bool
        False where the C library cannot (not glibc).
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(0)
    return True


def settle_objects() -> None:
    """Python's collector looks no more at the objects that are there now. For a program that has started and goes on for long.

    A full collection takes 50 ms and more where torch and a model are loaded, and a lookup of 2,000 blocks makes objects enough for
    one in every 40 calls.
    """
    gc.collect()
    gc.freeze()


def allow_open_files() -> int:
    """Raise this process's limit on open files (each connection is one) as far as it may, up to 65,536. Returns the limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        return wanted
    return soft
