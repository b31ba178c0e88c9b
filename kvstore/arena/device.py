"""The arena's memory: one `torch.uint8` tensor on a device, cut into pages.

On the CPU it is shared memory without a name (``memfd``): private to the user, gone with the process even after SIGKILL, and open
to a reader of the same user on the same host through ``/proc/<pid>/fd/<fd>``. Torch is imported only where a tensor is asked for, so
that a CPU node starts in a fraction of a second. `kvstore.arena.cuda` has that of a GPU.

Behind the pages lies a mark of 8 bytes for each, by which such a reader can see whether what it copied was still the block's; who
writes them, and which pages are whose, is the block table's business.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import re
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.block import Buffer
from kvstore.checked_copy import Copies, address_of, copy_checked, prepare
from kvstore.errors import ConfigError
from kvstore.settings import format_size

from .pages import Extent

if TYPE_CHECKING:
    import torch

    from .cuda import RemoteName

#: Memory that stays free for the rest of the machine when an arena is made.
HEADROOM_BYTES = 64 << 20
MARK_BYTES = 8


class Arena:
    """Pages of memory on one device. Built by `create`; the caller keeps reads and writes of a page apart.

    Parameters
    ----------
    size_bytes : int
        Rounded down to whole pages.
    page_bytes : int
        Bytes of one page.
    """

    device: str
    #: One number a page, seen by all who share the memory.
    marks: memoryview
    #: Where the pages begin, for `copies`.
    address: int
    #: Descriptor of the memory that others on this host may map, and its bytes: the marks, and on the CPU before them the pages.
    fd: int = -1
    shared_bytes: int
    #: How others on this host find pages that are a GPU's; None where they are in that memory, or nobody can.
    remote: RemoteName | None = None

    def __init__(self, size_bytes: int, page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.pages = size_bytes // page_bytes
        self.size_bytes = self.pages * page_bytes

    @property
    def tensor(self) -> torch.Tensor:
        """The whole arena, uint8 [size_bytes]; shares memory."""
        raise NotImplementedError

    @property
    def marks_at(self) -> int:
        """Where in the shared memory the marks begin."""
        return -(-self.size_bytes // MARK_BYTES) * MARK_BYTES

    def write(self, extents: Sequence[Extent], offset: int, data: Buffer, crc: int = 0) -> int:
        """Copy `data` to the place `offset` bytes into `extents`. The copy runs without the interpreter lock.

        Returns
        -------
        int
            `crc`, the CRC-32C of what is before, continued over `data`; on the CPU over what was written, whoever else has hold of `data`.
        """
        view = memoryview(data).cast("B")
        done = 0
        for start, length in self.pieces(extents, offset, len(view)):
            crc = self._store(start, view[done : done + length], crc)
            done += length
        return crc

    def read(self, extents: Sequence[Extent], offset: int, length: int) -> list[Buffer]:
        """The `length` bytes that start `offset` bytes into `extents`.

        Returns
        -------
        list of buffer
            On the CPU read-only views of the arena itself, one a run, valid only as long as the pages are the caller's; on CUDA copies.
        """
        return [self._load(start, size) for start, size in self.pieces(extents, offset, length)]

    def copies(self) -> Copies:
        """An empty list of copies, to be made in one go: from memory of this process to places behind `address`."""
        return Copies()

    def close(self) -> None:
        """Give the memory back. Views that are still about keep it alive."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def pieces(self, extents: Sequence[Extent], offset: int, length: int) -> list[tuple[int, int]]:
        """Where the same bytes lie, as (byte, bytes) of the arena."""
        pieces = []
        for extent in extents:
            size = extent.count * self.page_bytes
            if offset >= size:
                offset -= size
                continue
            if not length:
                break
            piece = min(size - offset, length)
            pieces.append((extent.start * self.page_bytes + offset, piece))
            length -= piece
            offset = 0
        if length:
            raise ValueError(f"{length} bytes lie beyond the end of the extents")
        return pieces

    def _store(self, start: int, data: memoryview, crc: int) -> int:
        raise NotImplementedError

    def _load(self, start: int, length: int) -> Buffer:
        raise NotImplementedError


class CpuArena(Arena):
    """Shared memory of this host, pre-faulted so that the first put is as quick as the last."""

    device = "cpu"

    def __init__(self, size_bytes: int, page_bytes: int) -> None:
        super().__init__(size_bytes, page_bytes)
        prepare()
        #: With the marks, which lie behind the last page.
        self.shared_bytes = self.marks_at + self.pages * MARK_BYTES
        self.fd = sealed_memory("concertina-arena", self.shared_bytes)
        self._map = mmap.mmap(self.fd, self.shared_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.address = address_of(self._map)
        self._view = memoryview(self._map)[: self.size_bytes]
        self.marks = memoryview(self._map)[self.marks_at :].cast("Q")
        self._readonly = self._view.toreadonly()

    @cached_property
    def tensor(self) -> torch.Tensor:
        import torch

        return torch.frombuffer(self._map, dtype=torch.uint8, count=self.size_bytes)

    def _store(self, start: int, data: memoryview, crc: int) -> int:
        return copy_checked(self._view[start : start + len(data)], data, crc)

    def _load(self, start: int, length: int) -> Buffer:
        return self._readonly[start : start + length]


def sealed_memory(name: str, size_bytes: int) -> int:
    """Descriptor of nameless shared memory of this user, of a size that nobody can change: a page that is gone would kill who maps it."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size_bytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


def create(size_bytes: int, device: str = "cpu", page_bytes: int = 4096) -> Arena:
    """An arena of `size_bytes` on ``cpu``, ``cuda`` or ``cuda:N``.

    Raises
    ------
    ConfigError
        For a size of less than one page or more than is free, an unknown device, or a GPU that is not there.
    """
    if size_bytes < page_bytes:
        raise ConfigError(f"an arena of {size_bytes} bytes holds no page of {page_bytes}; give --arena a size such as 256MiB")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"unknown device {device!r}; use cpu, cuda or cuda:N")
    if device == "cpu":
        _require(size_bytes, available_memory(), "this machine")
        return CpuArena(size_bytes, page_bytes)
    import torch

    index = int(device.partition(":")[2] or 0)
    if not torch.cuda.is_available() or index >= torch.cuda.device_count():
        raise ConfigError(f"there is no GPU for device {device!r}; use --device cpu, or a cuda:N below {torch.cuda.device_count()}")
    from .cuda import CudaArena

    _require(size_bytes, torch.cuda.mem_get_info(index)[0], f"GPU {index}")
    return CudaArena(size_bytes, page_bytes, f"cuda:{index}")


def _require(size_bytes: int, free_bytes: int, where: str) -> None:
    if size_bytes > free_bytes - HEADROOM_BYTES:
        raise ConfigError(
            f"an arena of {format_size(size_bytes)} does not fit: {where} has {format_size(free_bytes)} free; "
            f"give --arena at most {max(0, free_bytes - HEADROOM_BYTES) >> 20}MiB"
        )


def available_memory() -> int:
    """Bytes that this process may still take: what the kernel calls available, or the control group's rest if that is less.

    File cache that belongs to the group counts as free, since the kernel gives it up first.
    """
    free = _field("/proc/meminfo", "MemAvailable:") * 1024
    for folder, limit, used, cache in (
        ("/sys/fs/cgroup/", "memory.max", "memory.current", ("active_file", "inactive_file")),
        ("/sys/fs/cgroup/memory/", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")),
    ):
        bound = _text(folder + limit).strip()
        if bound.isdigit():
            cached = sum(_field(folder + "memory.stat", name) for name in cache)
            free = min(free, int(bound) - int(_text(folder + used)) + cached)
    return free


def _field(path: str, name: str) -> int:
    """The number after `name` in a file of one name and value a line; 0 if it is not there."""
    match = re.search(rf"^{name}\s+(\d+)", _text(path), re.MULTILINE)
    return int(match[1]) if match else 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
