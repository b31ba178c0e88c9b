"""Faults of the disk behind an arena: damaged, cut, exchanged and vanished files, no room, and a node that dies while it writes."""

from __future__ import annotations

import asyncio
import random
import resource
import shutil
from pathlib import Path

from . import node_faults
from .base import Fault
from .node_faults import VICTIM
from .system import System


class SpillFault(Fault):
    """Something that happens to the files of one node, under load that spills and reads back."""

    spill = True
    load = "pressure"
    lasts_s = 0.5

    async def inject(self, system: System) -> None:
        await asyncio.to_thread(self.harm, system.spill_of(VICTIM))

    def harm(self, directory: Path) -> None:
        """Do it."""
        raise NotImplementedError


def files(directory: Path) -> list[Path]:
    """The blocks that are spilled now."""
    return sorted(directory.rglob("*.kvblock"))


class Flip(SpillFault):
    """A bit changes in every file."""

    def harm(self, directory: Path) -> None:
        for path in files(directory):
            try:
                with path.open("r+b") as file:
                    at = random.randrange(path.stat().st_size)
                    file.seek(at)
                    byte = file.read(1)[0]
                    file.seek(at)
                    file.write(bytes([byte ^ 1 << random.randrange(8)]))
            except (FileNotFoundError, IndexError, ValueError):
                continue  # dropped meanwhile


class Truncate(SpillFault):
    """Every file loses its second half."""

    def harm(self, directory: Path) -> None:
        for path in files(directory):
            try:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
            except FileNotFoundError:
                continue


class Swap(SpillFault):
    """Every file takes the place of another block's."""

    def harm(self, directory: Path) -> None:
        found = files(directory)
        for one, other in zip(found[::2], found[1::2], strict=False):
            try:
                kept = one.read_bytes()
                one.write_bytes(other.read_bytes())
                other.write_bytes(kept)
            except FileNotFoundError:
                continue


class Remove(SpillFault):
    """All files vanish, with their folders."""

    def harm(self, directory: Path) -> None:
        for folder in directory.iterdir():
            if folder.is_dir():
                shutil.rmtree(folder, ignore_errors=True)


class Full(Fault):
    """There is no room on the disk: no file may grow."""

    spill = True
    load = "pressure"
    lasts_s = 0.5

    async def inject(self, system: System) -> None:
        pid = system.nodes[VICTIM].pid
        self._limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1000, self._limits[1]))

    async def heal(self, system: System) -> None:
        resource.prlimit(system.nodes[VICTIM].pid, resource.RLIMIT_FSIZE, self._limits)


class Kill(node_faults.Kill):
    """SIGKILL while blocks are being spilled; the next incarnation takes over what the files still certify."""

    spill = True

    def __init__(self) -> None:
        super().__init__("pressure")
