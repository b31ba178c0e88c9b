"""Memory of one GPU as an arena, and how another process of the same user reads it where it is.

Copies go through pinned host memory, pieces in turns: while one is on its way to the GPU the next is copied and checked. The marks lie in
host memory that both processes see. The GPU's own memory is named to others by a handle of CUDA's inter-process communication (CUDA
driver API, "cuIpcGetMemHandle"); who opens it can write to it as well, so it goes to the same user only, and every reader checks CRCs.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch

from kvstore.block import Buffer
from kvstore.checked_copy import Copies, copy_checked, prepare
from kvstore.errors import TransportError

from .device import MARK_BYTES, Arena, sealed_memory
from .pages import Extent

#: Pieces of pinned memory through which a put goes, and the size of each.
PIECES, PIECE_BYTES = 3, 2 << 20
_LAZY_PEER_ACCESS = 1
_HANDLE_BYTES = 64
_NAME = struct.Struct(f"<16sQQ{_HANDLE_BYTES}s")


class CudaArena(Arena):
    """Pages of a GPU's memory; marks, and the handle by which others find it, for readers on this host."""

    def __init__(self, size_bytes: int, page_bytes: int, device: str) -> None:
        super().__init__(size_bytes, page_bytes)
        prepare()
        self.device = device
        self._tensor = torch.empty(self.size_bytes, dtype=torch.uint8, device=device)
        self.shared_bytes = self.pages * MARK_BYTES
        self.fd = sealed_memory("concertina-marks", self.shared_bytes)
        self.marks = memoryview(mmap.mmap(self.fd, self.shared_bytes, flags=mmap.MAP_SHARED)).cast("Q")
        self.address = 0
        self.remote = name_of(self._tensor)
        self._writes, self._reads = (torch.cuda.Stream(device) for _ in range(2))
        self._pieces = [_Piece() for _ in range(PIECES)]
        self._next = 0
        self._writing = threading.Lock()

    @property
    def tensor(self) -> torch.Tensor:
        return self._tensor

    @property
    def marks_at(self) -> int:
        return 0

    def write(self, extents: Sequence[Extent], offset: int, data: Buffer, crc: int = 0) -> int:
        with self._writing, torch.cuda.stream(self._writes):
            try:
                return super().write(extents, offset, data, crc)
            finally:
                self._writes.synchronize()  # other processes read what is committed, whatever stream they are on

    def read(self, extents: Sequence[Extent], offset: int, length: int) -> list[Buffer]:
        pieces = self.pieces(extents, offset, length)
        if not length:
            return []
        out, at = torch.empty(length, dtype=torch.uint8, pin_memory=True), 0
        with torch.cuda.stream(self._reads):
            for start, size in pieces:
                out[at : at + size].copy_(self._tensor[start : start + size], non_blocking=True)
                at += size
        self._reads.synchronize()
        return [memoryview(out.numpy()).toreadonly()]

    def copies(self) -> Copies:
        return _CopiesIn(self)

    def close(self) -> None:
        super().close()
        self._tensor = self._tensor[:0]

    def take(self, staged: torch.Tensor, ranges: Sequence[tuple[int, int, int]]) -> None:
        """Copy ranges (place here, place in `staged`, bytes) of pinned memory in, and wait for it."""
        with self._writing, torch.cuda.stream(self._writes):
            for place, at, size in ranges:
                self._tensor[place : place + size].copy_(staged[at : at + size], non_blocking=True)
            self._writes.synchronize()

    def _store(self, start: int, data: memoryview, crc: int) -> int:
        for at in range(0, len(data), PIECE_BYTES):
            part, piece = data[at : at + PIECE_BYTES], self._pieces[self._next]
            self._next = (self._next + 1) % PIECES
            piece.sent.synchronize()
            crc = copy_checked(piece.view, part, crc)  # of what is sent, whoever else has hold of `data`
            self._tensor[start + at : start + at + len(part)].copy_(piece.memory[: len(part)], non_blocking=True)
            piece.sent.record()
        return crc


class _CopiesIn(Copies):
    """Copies to an arena: into pinned memory, where they are checked, and from there in as few pieces as can be.

    What lies between two of them there, the end of a page, goes along.
    """

    def __init__(self, arena: CudaArena) -> None:
        super().__init__()
        self._arena = arena
        self._ranges: list[tuple[int, int, int]] = []
        self._size = 0

    def add(self, to: int, address: int, size: int, goes_on: bool) -> None:
        place, at, length = self._ranges[-1] if self._ranges else (0, 0, 0)
        if length and 0 <= to - place - length < self._arena.page_bytes:
            self._ranges[-1] = (place, at, to - place + size)
            self._size = at + to - place + size
            super().add(at + to - place, address, size, goes_on)
        else:
            self._ranges.append((to, self._size, size))
            super().add(self._size, address, size, goes_on)
            self._size += size

    def make(self) -> Sequence[int]:
        staged = torch.empty(self._size, dtype=torch.uint8, pin_memory=True)
        self.move(staged.data_ptr())
        crcs = super().make()
        self._arena.take(staged, self._ranges)
        return crcs


class _Piece:
    """Pinned memory, and when it may be written to again."""

    def __init__(self) -> None:
        self.memory = torch.empty(PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self.view = memoryview(self.memory.numpy())
        self.sent = torch.cuda.Event()


# ------------------------------------------------------------------------------------------------------ across processes


@dataclass(frozen=True, slots=True)
class RemoteName:
    """Where memory of a GPU is found by another process: the GPU's identity, and the handle of an allocation with an offset into it."""

    gpu: bytes
    offset: int
    size_bytes: int
    handle: bytes

    def to_bytes(self) -> bytes:
        return _NAME.pack(self.gpu, self.offset, self.size_bytes, self.handle)

    @classmethod
    def from_bytes(cls, data: bytes) -> RemoteName:
        """Raises TransportError for what is no such name."""
        if len(data) != _NAME.size:
            raise TransportError(f"{len(data)} bytes name no memory of a GPU")
        return cls(*_NAME.unpack(data))


def name_of(memory: torch.Tensor) -> RemoteName | None:
    """The name of a tensor's memory; None where the system cannot share it (some virtual GPUs)."""
    base, size, handle = ctypes.c_uint64(), ctypes.c_size_t(), _Handle()
    pointer, driver = memory.data_ptr(), _driver()
    if driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), ctypes.c_uint64(pointer)):
        return None
    if driver.cuIpcGetMemHandle(ctypes.byref(handle), base):
        return None
    return RemoteName(_identity(memory.device.index), pointer - base.value, memory.numel(), bytes(handle.bytes))


def can_attach() -> bool:
    """Whether this process uses a GPU already: to begin with one takes some hundred MiB of it, which no reader of blocks should."""
    return "torch" in sys.modules and torch.cuda.is_available() and torch.cuda.is_initialized()


def attach(name: RemoteName) -> torch.Tensor:
    """Another process's memory as a tensor, uint8 [bytes] on its GPU; given up when the tensor and its views are gone.

    Raises
    ------
    TransportError
        Where this process does not see that GPU, or the driver refuses: the memory's own process, or another container.
    """
    index = next((i for i in range(torch.cuda.device_count()) if _identity(i) == name.gpu), None)
    if index is None:
        raise TransportError("the node's GPU is not one of this process's")
    handle, pointer = _Handle(), ctypes.c_uint64()
    ctypes.memmove(ctypes.byref(handle), name.handle, _HANDLE_BYTES)
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()  # this thread has a context from here on
        error = _driver().cuIpcOpenMemHandle_v2(ctypes.byref(pointer), handle, _LAZY_PEER_ACCESS)
    if error:
        raise TransportError(f"the driver does not open the node's memory (error {error})")
    lent = _Lent(pointer.value + name.offset, name.size_bytes)
    weakref.finalize(lent, _detach, pointer.value, index).atexit = False
    return torch.as_tensor(lent, device=f"cuda:{index}")


class _Handle(ctypes.Structure):
    _fields_ = (("bytes", ctypes.c_ubyte * _HANDLE_BYTES),)


class _Lent:
    """Memory as torch takes it in, without a copy."""

    def __init__(self, pointer: int, size_bytes: int) -> None:
        self.__cuda_array_interface__ = {"shape": (size_bytes,), "typestr": "|u1", "data": (pointer, False), "version": 3}


def _detach(pointer: int, index: int) -> None:
    with torch.cuda.device(index):
        torch.cuda.current_stream().synchronize()
        _driver().cuIpcCloseMemHandle(ctypes.c_uint64(pointer))


@cache
def _identity(index: int) -> bytes:
    """The 16 bytes that name a GPU of this process wherever it is visible."""
    device, identity = ctypes.c_int(), (ctypes.c_ubyte * 16)()
    if _driver().cuDeviceGet(ctypes.byref(device), index) or _driver().cuDeviceGetUuid_v2(ctypes.byref(identity), device):
        return b"\0" * 16
    return bytes(identity)


@cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    driver.cuIpcOpenMemHandle_v2.argtypes = [ctypes.c_void_p, _Handle, ctypes.c_uint]
    return driver
