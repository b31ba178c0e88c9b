"""What every benchmark hands back, and how times are taken (DESIGN §15).

Only ratios to what ran beside a thing *in the same run* mean something on another machine, so contestants take turns, round after
round, and all samples are kept.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
_PACKAGES = ("torch", "numpy", "numba", "transformers", "ray", "grpcio", "redis")


@dataclass
class Result:
    """One benchmark's outcome; units are part of each key.

    Parameters
    ----------
    benchmark : str
    configuration : dict
        Every setting that the figures depend on.
    seed : int
    warm_up : int
        Rounds that were run and not counted.
    samples : dict of str to list of float
        All measured values, in order, such as ``{"int8.decode_s": [...]}``.
    rows : list of dict
        One entry a contestant, speed and quality side by side.
    ratios : dict of str to float
        Each against what ran beside it, such as ``{"int8.decode_to_copy": 0.4}``.
    """

    benchmark: str
    configuration: dict[str, Any]
    seed: int = 0
    warm_up: int = 1
    samples: dict[str, list[float]] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    ratios: dict[str, float] = field(default_factory=dict)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Result:
        """What `to_json` gave, without what it ran on."""
        return cls(**{f.name: found[f.name] for f in fields(cls)})

    def to_json(self) -> dict[str, Any]:
        """The whole object, with what it ran on."""
        return {"schema_version": SCHEMA_VERSION, **asdict(self), **environment()}


def environment() -> dict[str, Any]:
    """Commit, hardware, versions and time of this run."""
    return {
        "commit": commit(),
        "started_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "hardware": hardware(),
        "versions": {"python": platform.python_version(), **_versions()},
    }


def commit() -> str | None:
    """The checkout's commit, with ``+`` where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    try:
        head, changes = (
            subprocess.run(["git", "-C", str(root), *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return head + "+" * bool(changes)


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and accelerators."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def take_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1, report: Callable[[int, int], None] = lambda d, t: None
) -> dict[str, list[float]]:
    """Seconds of each contestant in each round; all run once before any runs again."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for number in range(-warm_up, rounds):
        report(number + warm_up, rounds + warm_up)
        for name, call in contestants.items():
            began = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def relative_speed(samples: Mapping[str, list[float]], ours: str, theirs: str) -> float:
    """How many times faster `ours` is than `theirs`: the median over rounds of the two times' quotient."""
    return statistics.median(t / o for o, t in zip(samples[ours], samples[theirs], strict=True))


def log(message: str) -> None:
    """A line for people; results alone go to stdout."""
    print(message, file=sys.stderr, flush=True)
