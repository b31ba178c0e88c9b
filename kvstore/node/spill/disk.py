"""A directory as a tier: one file a block.

A file is written under another name and renamed, so a process that is killed leaves whole blocks and at most one stump, which the next
one removes. Nothing is synced: what a power failure tears does not certify itself and is a miss.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

from kvstore.errors import CapacityError, ConcertinaError, ConfigError, CorruptBlockError, NotFoundError, TransportError

from .base import Buffer, SpillTier, Survivor
from .record import HEAD_BYTES

SUFFIX = ".kvblock"
_NAME = re.compile(r"([0-9a-f]{64})" + re.escape(SUFFIX))
_FOLDER = re.compile(r"[0-9a-f]{2}")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class DiskTier(SpillTier):
    """Files ``DIR/ab/ab….kvblock``, readable by their owner alone.

    Parameters
    ----------
    directory : path
        Made if missing. No other living node may use it.

    Raises
    ------
    ConfigError
        When it cannot be made or written, or another process has it.
    """

    name: ClassVar[str] = "disk"

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        try:
            self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"--spill {directory} cannot be used: {error.strerror}; give a directory that this user may write") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise ConfigError(f"--spill {directory} belongs to another living node; give each node a directory of its own") from None

    def store(self, id: bytes, pieces: Sequence[Buffer]) -> None:
        path, draft = self._path(id), self.directory / "draft"
        try:
            path.parent.mkdir(exist_ok=True, mode=0o700)
            with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600), "wb") as file:
                file.writelines(pieces)
            draft.replace(path)
        except OSError as error:
            with suppress(OSError):
                draft.unlink(missing_ok=True)
            raise _translated(error, "written") from error

    def load(self, id: bytes, size_bytes: int) -> Buffer:
        try:
            with open(os.open(self._path(id), os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
                if (size := os.fstat(file.fileno()).st_size) != size_bytes:
                    raise CorruptBlockError(f"a spilled block's file has {size} bytes, not {size_bytes}")
                data = bytearray(size_bytes)
                at = 0
                while at < size_bytes and (count := file.readinto(memoryview(data)[at:])):
                    at += count
                return data
        except OSError as error:
            raise _translated(error, "read") from error

    def drop(self, id: bytes) -> None:
        try:
            self._path(id).unlink(missing_ok=True)
        except OSError as error:
            raise _translated(error, "removed") from error

    def survivors(self) -> Iterator[Survivor]:
        with suppress(OSError):
            (self.directory / "draft").unlink(missing_ok=True)
        try:
            found = sorted(self._files())
        except OSError as error:
            raise _translated(error, "looked for") from error
        for _, id, size in found:
            with suppress(OSError):
                with open(os.open(self._path(id), os.O_RDONLY | os.O_NOFOLLOW), "rb", buffering=0) as file:
                    head = file.read(HEAD_BYTES)
                yield Survivor(id, size, head)

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _path(self, id: bytes) -> Path:
        name = id.hex()
        return self.directory / name[:2] / (name + SUFFIX)

    def _files(self) -> Iterator[tuple[int, bytes, int]]:
        """Time of writing, id and size of every file whose name is a block's."""
        folders = [item.name for item in os.scandir(self.directory) if _FOLDER.fullmatch(item.name)]
        for folder in folders:
            with suppress(OSError):
                for item in os.scandir(self.directory / folder):
                    if (match := _NAME.fullmatch(item.name)) and match[1].startswith(folder) and item.is_file(follow_symlinks=False):
                        status = item.stat(follow_symlinks=False)
                        yield status.st_mtime_ns, bytes.fromhex(match[1]), status.st_size


def _translated(error: OSError, what: str) -> ConcertinaError:
    """Our exception for one of the file system."""
    text = f"a spilled block could not be {what}: {error.strerror or error}"
    if isinstance(error, FileNotFoundError):
        return NotFoundError(text)
    return CapacityError(text) if error.errno in _FULL else TransportError(text)
