"""Shapes that were found on this machine before, so that an engine starts without finding them again.

`find_shapes` runs dozens of forwards. What it finds depends on the model, the libraries and the processor, and on nothing else; so it is
kept under the digest of those in the cache directory. A file that is missing or damaged is found anew; one that cannot be written costs
the next start some seconds.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import transformers

from kvstore.identity import digest
from kvstore.settings import cache_dir

from .runner import Shapes

log = logging.getLogger(__name__)


def machine(device: str) -> dict[str, str]:
    """What of this machine and its libraries decides how a matrix product sums."""
    cpuinfo = Path("/proc/cpuinfo")
    first = cpuinfo.read_text().partition("\n\n")[0].splitlines() if cpuinfo.exists() else []
    kept = [line for line in first if line.startswith(("model name", "flags", "Features", "CPU implementer", "CPU part"))]
    return {
        "processor": "\n".join([platform.machine(), platform.processor(), *kept]),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def remembered_shapes(facts: Mapping[str, str], find: Callable[[], tuple[Shapes, float]]) -> tuple[Shapes, float, bool]:
    """What `find` gave the last time with the same `facts`, or gives now.

    Returns
    -------
    shapes : Shapes
    rate : float
        Prefill rate in tokens a second, a first estimate.
    known : bool
        Whether `find` was spared.
    """
    name = digest(*(part.encode() for item in sorted(facts.items()) for part in item)).hex()
    path = cache_dir() / "shapes" / f"{name}.json"
    found = _read(path)
    if found is not None:
        return *found, True
    shapes, rate = find()
    _write(path, shapes, rate)
    return shapes, rate, False


def _read(path: Path) -> tuple[Shapes, float] | None:
    try:
        stored = json.loads(path.read_text())
        shapes = Shapes(tuple(int(n) for n in stored["tiles"]), int(stored["quantum"]), int(stored["rows"]), int(stored.get("prefill", 0)))
        rate = float(stored["prefill_tokens_per_s"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s) and is made anew", path, error)
        return None
    return (shapes, rate) if shapes.tiles[:1] == (1,) and 1 <= shapes.quantum <= shapes.rows and shapes.prefill >= 0 and rate > 0 else None


def _write(path: Path, shapes: Shapes, rate: float) -> None:
    stored = {"tiles": shapes.tiles, "quantum": shapes.quantum, "rows": shapes.rows, "prefill": shapes.prefill}
    stored["prefill_tokens_per_s"] = rate
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
            json.dump(stored, file)
        os.replace(file.name, path)
    except OSError as error:
        log.warning("the shapes that were found could not be kept: %s", error)
