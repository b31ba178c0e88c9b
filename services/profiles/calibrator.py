"""Calibration as a child process of the worker: at a low priority, for a bounded time, and never longer than the worker lives."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from kvstore.codecs import Profile
from kvstore.errors import ConcertinaError, DeadlineError

from .local import draft_of

#: Four minutes of two idle cores for the default model; a busy machine, or a large model, takes longer.
TIMEOUT_S = 3600.0
#: Makes the command line that writes the profile of the model in a directory to a file.
Command = Callable[[str, Path], list[str]]


def calibrate_command(model: str, out: Path) -> list[str]:
    """``concertina calibrate``."""
    return [sys.executable, "-m", "services.cli", "calibrate", "--model", model, "--out", str(out), "--json"]


async def calibrate(model: str, path: Path, command: Command = calibrate_command, timeout_s: float = TIMEOUT_S) -> Profile:
    """Make the profile of the model in the directory `model`, and keep it at `path`. Cancelling this ends the child.

    Raises
    ------
    ConcertinaError
        Where no profile came of it; a DeadlineError after `timeout_s`.
    OSError
        Where it cannot be started or kept.
    """
    with draft_of(path) as draft:
        await _run([sys.executable, "-m", "services.profiles.child", str(os.getpid()), *command(model, draft)], timeout_s)
        return await asyncio.to_thread(Profile.load, draft)


async def _run(command: list[str], timeout_s: float) -> None:
    child = _start(command)
    try:
        status = await asyncio.to_thread(child.wait, timeout_s)
    except subprocess.TimeoutExpired:
        raise DeadlineError(f"calibration was not done after {timeout_s:.0f} s; run `concertina calibrate` by hand") from None
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if status:
        raise ConcertinaError(f"calibration ended with exit status {status}; the worker's log has the reason")


def _start(command: list[str]) -> subprocess.Popen:
    """Not by asyncio, which may want the main thread's loop. stderr goes to the worker's log."""
    return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
