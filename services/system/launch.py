"""Bringing a system up: Redis first, then nodes and workers side by side, each waited for, all or nothing."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from kvstore.errors import ConfigError, TransportError
from kvstore.metadata import WorkerRecord
from kvstore.metadata.embedded import start_valkey

from . import record
from .members import members
from .plan import INFERENCE_PORT, REDIS_PORT, Plan
from .processes import describe, spawn
from .record import UP, SystemRecord

NODE_TIMEOUT_S = 90.0
#: A large model takes its time; a process that has failed is noticed at once all the same.
WORKER_TIMEOUT_S = 1800.0
JOIN_TIMEOUT_S = 15.0
#: First reminder of what is waited for; each next one comes half as much again later.
REMIND_S = 10.0
TAIL_LINES = 12


@dataclass(slots=True)
class Child:
    """A part that has been started and is waited for."""

    part: str
    process: subprocess.Popen
    out: Path
    log: Path
    since: float
    timeout_s: float


def launch(plan: Plan, system: SystemRecord, say: Callable[[str], None]) -> None:
    """Start every part of `plan` and wait until all are ready. The caller ends what has started when this raises.

    Parameters
    ----------
    plan : Plan
    system : SystemRecord
        Written with every step.
    say : callable
        Takes one line of progress.

    Raises
    ------
    ConfigError, TransportError
        Name the part that failed, with the end of its log.
    """
    finish(plan, system, begin(plan, system, say), say)


def begin(plan: Plan, system: SystemRecord, say: Callable[[str], None]) -> list[Child]:
    """The first half of `launch`: Redis is up and all other parts are starting."""
    redis_port = _reserve(plan, system)
    if plan.redis:
        members(plan.redis)  # an answer, or an error that says there is none
    else:
        _start_redis(system, redis_port, say)
    system.codec = plan.codec
    system.model = plan.model.name if plan.model else None
    say(f"starting {plan.nodes} store node(s)" + (f" and {plan.workers} worker(s) of {system.model} …" if plan.workers else " …"))
    children = [start(system, f"node-{number}", plan.node_command(number, system.redis), NODE_TIMEOUT_S) for number in range(plan.nodes)]
    if plan.workers:
        children.append(start_worker(plan, system, "worker", system.inference))
    return children


def finish(plan: Plan, system: SystemRecord, children: list[Child], say: Callable[[str], None]) -> None:
    """The second half of `launch`: wait until all `children` are ready and have joined."""
    _wait(children, say)
    workers = _wait_for_members(plan, system.redis)
    mine = next((w for w in workers if w.address == system.inference), None)
    system.codec, system.http = (mine.codec, mine.http) if mine else (plan.codec, None)
    system.phase = UP
    system.save()


def _start_redis(system: SystemRecord, port: int, say: Callable[[str], None]) -> None:
    since = time.monotonic()
    # Its title would hide the path of its configuration, by which `down` knows it.
    server = start_valkey(system.redis_directory, port, settings={"set-proc-title": "no"})
    system.processes.append(describe("redis", server.pid))
    system.save()
    say(f"redis: ready at {server.url} ({time.monotonic() - since:.1f} s)")


def start_worker(plan: Plan, system: SystemRecord, part: str, listen: str) -> Child:
    """Start one worker process of `plan`, with `part` for a name, without waiting for it."""
    return start(system, part, plan.worker_command(system.redis or "", listen, system.scratch / part), WORKER_TIMEOUT_S)


def start(system: SystemRecord, part: str, command: list[str], timeout_s: float) -> Child:
    """Start one part and write it down."""
    out, log = system.logs / f"{part}.out", system.logs / f"{part}.log"
    process = spawn(command, system.marker, out, log)
    system.processes.append(describe(part, process.pid))
    system.save()
    return Child(part, process, out, log, time.monotonic(), timeout_s)


def _wait(children: list[Child], say: Callable[[str], None]) -> None:
    """Until each has printed its line of JSON. Raises ConfigError or TransportError for the first that fails."""
    began = time.monotonic()
    waiting, remind_s = list(children), REMIND_S
    while waiting:
        for child in list(waiting):
            took_s = time.monotonic() - child.since
            if _ready(child):
                say(f"{child.part}: ready ({took_s:.1f} s)")
                waiting.remove(child)
            elif child.process.poll() is not None:
                raise _failure(child, f"ended with exit status {child.process.returncode}")
            elif took_s > child.timeout_s:
                raise _failure(child, f"was not ready after {child.timeout_s:.0f} s")
        if waiting and time.monotonic() - began > remind_s:
            say(f"still waiting for {', '.join(c.part for c in waiting)} ({remind_s:.0f} s) …")
            remind_s *= 1.5
        time.sleep(0.05)


def _wait_for_members(plan: Plan, redis: str) -> list[WorkerRecord]:
    """Until Redis names them all: the workers find nodes, and `status` finds both, from there alone. Gives the workers."""
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    expected = {plan.node_id(number) for number in range(plan.nodes)}
    while True:
        nodes, workers = members(redis)
        missing = expected - {node.id for node in nodes}
        if not missing and len(workers) >= plan.workers:
            return workers
        if time.monotonic() > deadline:
            absent = ", ".join(sorted(missing)) or f"{plan.workers - len(workers)} worker(s)"
            raise TransportError(f"{absent} did not join the cluster at {redis} within {JOIN_TIMEOUT_S:.0f} s")
        time.sleep(0.1)


def _ready(child: Child) -> bool:
    line, newline, _ = child.out.read_text(errors="replace").partition("\n")
    if not newline:
        return False
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _failure(child: Child, what: str) -> ConfigError | TransportError:
    """Exit status 2 of a part is wrong usage, which is ours then."""
    lines = child.log.read_text(errors="replace").splitlines()[-TAIL_LINES:]
    kind = ConfigError if child.process.poll() == 2 else TransportError
    return kind(f"{child.part} {what}; its log ends:\n" + "\n".join("  " + line for line in lines))


def _reserve(plan: Plan, system: SystemRecord) -> int:
    """Choose the ports of the workers' gRPC, kept in `system`, and of Redis, returned; no two systems choose the same."""
    with record.lock(".ports", wait=True):
        others = [r for name in record.names() if name != system.name and (r := record.load(name))]
        taken = {c.laddr.port for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
        taken |= {port for r in others for port in r.ports}
        inference, redis = (next(p for p in range(standard, 65536) if p not in taken) for standard in (INFERENCE_PORT, REDIS_PORT))
        system.inference = f"127.0.0.1:{inference}" if plan.workers else None
        system.redis = plan.redis or f"redis://127.0.0.1:{redis}/0"
        system.save()
    return redis
