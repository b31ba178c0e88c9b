"""Starting processes that we can find again, and ending them and no others."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

import psutil

from kvstore.settings import environment

from .record import ProcessRecord, SystemRecord

#: Variable that every process of a system carries, and all that they start in their turn.
MARK = "CONCERTINA_UP"
#: Seconds that parts have to end by themselves: a worker flushes what it has to publish, a node finishes its reads.
PATIENCE_S = {"worker": 20.0, "node": 8.0, "redis": 5.0}


def spawn(command: list[str], marker: str, out: Path, log: Path) -> subprocess.Popen:
    """Start `command` in a session of its own, so that a Ctrl-C at our terminal does not reach it; stdout to `out`, stderr to `log`."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("wb") as stdout, log.open("wb") as stderr:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=environment(**{MARK: marker}),
            start_new_session=True,
        )


def describe(part: str, pid: int) -> ProcessRecord:
    """The record of a process that runs. A process that ended at once is recorded with time 0, which matches none."""
    try:
        return ProcessRecord(part, pid, psutil.Process(pid).create_time())
    except psutil.NoSuchProcess:
        return ProcessRecord(part, pid, 0.0)


def alive(record: ProcessRecord) -> psutil.Process | None:
    """The process of a record, when it still runs and is the same one."""
    try:
        process = psutil.Process(record.pid)
        same = abs(process.create_time() - record.started) < 0.05
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


def belonging(system: SystemRecord) -> list[psutil.Process]:
    """Every living process of a system: the recorded ones, all that carry its mark, and its Valkey, known by its configuration."""
    found = {p.pid: p for r in system.processes if (p := alive(r))}
    configuration = str(system.redis_directory / "valkey.conf")
    for process in psutil.process_iter():
        try:
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            marked = process.environ().get(MARK) == system.marker
            if marked or process.cmdline()[1:2] == [configuration]:
                found[process.pid] = process
        except psutil.Error:
            continue  # gone meanwhile, or another user's
    return list(found.values())


def end_system(system: SystemRecord) -> int:
    """End all processes of `system`: workers first, then nodes, then Redis, each with time to finish; the rest by force.

    Returns
    -------
    int
        Processes that were found at the start.
    """
    count = len(belonging(system))
    for part, patience_s in PATIENCE_S.items():
        members = [p for r in system.processes if r.part.startswith(part) and (p := alive(r))]
        _end(members, patience_s)
    _end(belonging(system), 2.0)
    for process in belonging(system):
        _send(process, signal.SIGKILL)
    _gone(belonging(system), 5.0)
    return count


def _end(processes: Iterable[psutil.Process], patience_s: float) -> None:
    """SIGTERM, wait, SIGKILL."""
    processes = list(processes)
    for process in processes:
        _send(process, signal.SIGTERM)
    for process in _gone(processes, patience_s):
        _send(process, signal.SIGKILL)
    _gone(processes, 2.0)


def _gone(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Wait until they are gone; gives those that are not. A zombie whose parent does not collect it counts as gone."""
    deadline = time.monotonic() + timeout_s
    while left := [p for p in processes if _runs(p)]:
        if time.monotonic() > deadline:
            return left
        time.sleep(0.05)
    return []


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:
        return
