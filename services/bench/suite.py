"""All benchmarks, one after the other in processes of their own; results kept as files, plots drawn from nothing but these."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError

from . import BENCHES
from .base import SCHEMA_VERSION, Result

#: Of one benchmark; the longest loads the model and serves for minutes.
TIMEOUT_S = 3600.0


def run_all(out: Path, quick: bool, say: Callable[[str], None]) -> dict[str, str | None]:
    """Run every benchmark and keep its object below `out`.

    Parameters
    ----------
    out : Path
        Directory, made where there is none.
    quick : bool
    say : callable
        Takes one line of progress.

    Returns
    -------
    dict
        Benchmark -> file written, None for one that failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    written: dict[str, str | None] = {}
    for number, name in enumerate(BENCHES, 1):
        say(f"{number}/{len(BENCHES)} {name} …")
        began = time.monotonic()
        command = [sys.executable, "-m", "services.cli", "bench", name, *(["--quick"] if quick else []), "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=False)
        written[name] = str(_keep(out, json.loads(done.stdout))) if done.returncode == 0 else None
        say(f"{name}: {written[name] or f'failed with exit status {done.returncode}'} ({time.monotonic() - began:.0f} s)")
    return written


def draw(results: Path, plots: Path) -> list[str]:
    """Write a plot for each kept result whose benchmark can draw one; the newest of a benchmark wins. Gives the files.

    Raises
    ------
    ConfigError
        For a directory without results, or a result of another schema.
    """
    newest: dict[str, dict[str, Any]] = {}
    for found in _kept(results):
        if found["started_utc"] >= newest.get(found["benchmark"], found)["started_utc"]:
            newest[found["benchmark"]] = found
    if not newest:
        raise ConfigError(f"{results} holds no results; make some with `make bench`")
    plots.mkdir(parents=True, exist_ok=True)
    files = []
    for name, found in sorted(newest.items()):
        plot = getattr(importlib.import_module(BENCHES[name][0]), "plot", None) if name in BENCHES else None
        if plot is not None:
            file = plots / f"{name}.svg"
            file.write_text(plot(Result.from_json(found)), encoding="utf-8")
            files.append(str(file))
    return files


def _keep(out: Path, found: dict[str, Any]) -> Path:
    """Named theme_hardware_date, so that two machines' results lie side by side."""
    hardware = found["hardware"]
    machine = re.sub(r"[^a-z0-9]+", "-", (hardware["gpus"] or [hardware["cpu"]])[0].lower()).strip("-")
    file = out / f"{found['benchmark']}_{machine}_{found['started_utc'][:10]}.json"
    file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return file


def _kept(results: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(results.glob("*.json")):
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("schema_version") != SCHEMA_VERSION:
            raise ConfigError(f"{file} has schema {found.get('schema_version')}, this version reads {SCHEMA_VERSION}; remove it")
        yield found
