"""Seeds that once failed: kept in ``seeds.txt`` beside this file and replayed by every test run, for ever."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

FILE = Path(__file__).with_name("seeds.txt")


def remembered() -> list[int]:
    """The seeds of the file: the first word of each line that is no comment."""
    return [int(line.split()[0]) for line in FILE.read_text().splitlines() if line and not line.startswith("#")]


def remember(seeds: Iterable[int]) -> None:
    """Add the seeds that are not there yet."""
    new = sorted(set(seeds) - set(remembered()))
    if new:
        with FILE.open("a") as file:
            file.writelines(f"{seed}\n" for seed in new)
