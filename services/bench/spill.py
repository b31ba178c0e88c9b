"""What a tier behind the arena costs: blocks written, read back and verified, and found again after a restart.

Beside each other: `DiskTier` (pages of a few large files, and a journal), a file a block, one log that is never compacted, and host
memory. The page cache is warm, as it is for what was spilled or asked for lately; a cold disk's own speed comes on top.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kvstore.block import BlockHeader, Distortion, EncodedBlock, LayerInfo
from kvstore.identity import NO_PARENT, digest
from kvstore.node.spill import SpillTier, create, record

from .base import Result, log, take_turns

SIZES = (64 << 10, 1 << 20)
TOTAL_BYTES, QUICK_BYTES = 256 << 20, 32 << 20
ROUNDS = 5


def configure(parser: argparse.ArgumentParser) -> None:
    """Arguments of the benchmark."""
    parser.add_argument("--dir", type=Path, metavar="DIR", help="where to write: on the disk that is meant (default: /tmp or so)")


class Files:
    """A file a block, written under another name and renamed."""

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir()

    def store(self, id: bytes, pieces: Sequence[bytes]) -> None:
        draft = self._place / "draft"
        with draft.open("wb") as file:
            file.writelines(pieces)
        draft.replace(self._place / id.hex())

    def load(self, id: bytes, size_bytes: int) -> bytes:
        return (self._place / id.hex()).read_bytes()

    def drop(self, id: bytes) -> None:
        (self._place / id.hex()).unlink()

    def close(self) -> None:
        """Nothing is open."""


class Log:
    """Records one after the other in one file."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT)
        self._places: dict[bytes, tuple[int, int]] = {}

    def store(self, id: bytes, pieces: Sequence[bytes]) -> None:
        at = os.lseek(self._file, 0, os.SEEK_END)
        self._places[id] = (at, os.writev(self._file, pieces))

    def load(self, id: bytes, size_bytes: int) -> bytes:
        at, size = self._places[id]
        return os.pread(self._file, size, at)

    def drop(self, id: bytes) -> None:
        """A log forgets a record and keeps its bytes until it is compacted, which is not counted here."""
        del self._places[id]

    def close(self) -> None:
        os.close(self._file)


def run(args: argparse.Namespace) -> Result:
    """All sizes, all contestants in turn."""
    total = QUICK_BYTES if args.quick else TOTAL_BYTES
    result = Result("spill", {"payload_bytes": list(SIZES), "total_bytes": total, "rounds": ROUNDS}, warm_up=1)
    for size in SIZES:
        log(f"blocks of {size >> 10} KiB")
        with tempfile.TemporaryDirectory(dir=args.dir) as place:
            _measure(result, Path(place), size, total // size)
    return result


def blocks(size: int, count: int) -> list[EncodedBlock]:
    """Blocks of one layer of random bytes."""
    rng = random.Random(size)
    rows = (LayerInfo(0, 0, Distortion(0.125, 0.125)),)
    made = EncodedBlock.build(BlockHeader(1, 2, 30, 3, 64, 0, 64, rows, 1), [rng.randbytes(size)])
    return [made.with_identity(digest(str(number).encode()), digest(b"bench"), NO_PARENT) for number in range(count)]


def _measure(result: Result, place: Path, size: int, count: int) -> None:
    made = blocks(size, count)
    pieces = {one.header.key: (record.prefix(""), one.header.to_bytes(), *one.payload) for one in made}
    record_bytes = sum(map(len, next(iter(pieces.values()))))
    disk = create("disk", directory=place / "disk", capacity_bytes=2 * size * count)
    tiers = {"disk": disk, "file": Files(place / "files"), "log": Log(place / "log"), "memory": create("memory")}
    steps = {"write": _write, "read": _read, "drop": _drop}
    calls = {f"{name}.{step}": _call(steps[step], tier, pieces, record_bytes) for name, tier in tiers.items() for step in steps}
    samples = take_turns(calls, ROUNDS)
    for id, parts in pieces.items():
        tiers["disk"].store(id, parts)
    samples |= take_turns({"disk.recover": lambda: [record.read_head(found.head) for found in tiers["disk"].survivors()]}, ROUNDS)
    for name, tier in tiers.items():
        tier.close()
        rows = {f"{step}_gb_per_s": _rate(samples[f"{name}.{step}"], size * count) for step in ("write", "read")}
        result.rows.append({"tier": name, "payload_bytes": size, **rows, **_recovery(name, samples, count)})
    result.samples |= {f"{size >> 10}kib.{name}_s": seconds for name, seconds in samples.items()}
    for step in ("write", "read"):
        for other in ("file", "log"):
            ratio = _rate(samples[f"disk.{step}"], 1) / _rate(samples[f"{other}.{step}"], 1)
            result.ratios[f"{size >> 10}kib.disk_to_{other}_{step}"] = ratio


def _call(step: Callable[..., None], *args: Any) -> Callable[[], None]:
    return lambda: step(*args)


def _write(tier: SpillTier, pieces: dict[bytes, tuple[bytes, ...]], record_bytes: int) -> None:
    for id, parts in pieces.items():
        tier.store(id, parts)


def _read(tier: SpillTier, pieces: dict[bytes, tuple[bytes, ...]], record_bytes: int) -> None:
    for id in pieces:
        record.read(tier.load(id, record_bytes))


def _drop(tier: SpillTier, pieces: dict[bytes, tuple[bytes, ...]], record_bytes: int) -> None:
    for id in pieces:
        tier.drop(id)


def _rate(seconds: list[float], size_bytes: float) -> float:
    return size_bytes / 1e9 / statistics.median(seconds)


def _recovery(name: str, samples: dict[str, list[float]], count: int) -> dict[str, float]:
    """How fast a restarted process finds its blocks again."""
    return {"recovered_blocks_per_s": count / statistics.median(samples["disk.recover"])} if name == "disk" else {}


def render(result: Result) -> str:
    """A line for each tier and size."""
    lines = ["payload      tier     write GB/s   read and verify GB/s   found again, blocks/s"]
    for row in result.rows:
        found = f"{row['recovered_blocks_per_s']:,.0f}" if "recovered_blocks_per_s" in row else "–"
        size = f"{row['payload_bytes'] >> 10} KiB"
        lines.append(f"{size:12} {row['tier']:8} {row['write_gb_per_s']:10.2f} {row['read_gb_per_s']:22.2f} {found:>23}")
    return "\n".join(lines)
