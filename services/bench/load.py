"""``bench serving --load``: a whole system asked for twice what it can do, for minutes.

First as many callers as the batch has places ask one request after the other: what they get is the capacity. Then requests arrive at
random, at twice that rate, whatever becomes of those before them. What should come out: the line in front of the model stays bounded,
what does not fit is refused at once with a delay, those admitted are answered in bounded time, and memory does not grow.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import psutil
from google.rpc import error_details_pb2, status_pb2

from protos.concertina.inference.v1 import inference_pb2 as pb
from protos.concertina.inference.v1 import inference_pb2_grpc as rpc
from services.system.processes import belonging
from services.system.record import SystemRecord
from services.system.wire import OPTIONS

from .base import Result, log
from .workload import percentile, system

SEED = 0
CALLERS = 8
CAPACITY_S = 30.0
OVERLOAD = 2.0
PROMPT_TOKENS, NEW_TOKENS = (16, 192), 12
#: No call hangs longer than this, whatever happens.
TIMEOUT_S = 300.0
SAMPLE_S = 2.0
ARENA_BYTES = 32 << 20


@dataclass(slots=True)
class Load:
    """What came of the calls. Times in seconds; `memory` are bytes of the system's processes, by time since the start."""

    stub: rpc.InferenceServiceStub
    rng: random.Random
    answered_s: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    delays_s: list[float] = field(default_factory=list)
    codes: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    most_in_flight: int = 0
    memory: list[tuple[float, int]] = field(default_factory=list)

    async def ask(self) -> None:
        """One call, whatever becomes of it."""
        ids = [self.rng.randrange(1000, 40_000) for _ in range(self.rng.randint(*PROMPT_TOKENS))]
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=ids), sampling=pb.Sampling(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        began = time.perf_counter()
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await self.stub.Generate(request, timeout=TIMEOUT_S)
            self.codes["OK"] += 1
            self.answered_s.append(time.perf_counter() - began)
        except grpc.RpcError as error:
            self.codes[error.code().name] += 1
            if error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                self.refused_s.append(time.perf_counter() - began)
                self.delays_s += _retry_delays(error)
        finally:
            self.in_flight -= 1

    async def closed_loop(self, callers: int, seconds: float) -> float:
        """Answers a second of `callers` that ask one call after the other."""
        end = time.perf_counter() + seconds

        async def caller() -> None:
            while time.perf_counter() < end:
                await self.ask()

        before, began = self.codes["OK"], time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(callers)))
        return (self.codes["OK"] - before) / (time.perf_counter() - began)

    async def open_loop(self, rate: float, seconds: float, running: SystemRecord) -> None:
        """Calls at random moments, `rate` a second, without waiting for their answers; then waits for those that are out."""
        began = time.perf_counter()
        calls: set[asyncio.Task] = set()
        next_sample = began
        while (now := time.perf_counter()) - began < seconds:
            if now >= next_sample:
                self.memory.append((now - began, memory_bytes(running)))
                next_sample = now + SAMPLE_S
            call = asyncio.create_task(self.ask())
            calls.add(call)
            call.add_done_callback(calls.discard)
            await asyncio.sleep(self.rng.expovariate(rate))
        if calls:
            await asyncio.wait(calls)


def memory_bytes(running: SystemRecord) -> int:
    """Resident bytes of all processes of the system, shared pages counted once for each."""
    total = 0
    for process in belonging(running):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue
    return total


def _retry_delays(error: grpc.RpcError) -> list[float]:
    """The delay that a refusal names, if it does."""
    raw = dict(error.trailing_metadata() or ()).get("grpc-status-details-bin", b"")
    info = error_details_pb2.RetryInfo()
    return [info.retry_delay.ToTimedelta().total_seconds() for part in status_pb2.Status.FromString(raw).details if part.Unpack(info)]


def run_load(model: Path, minutes: float, device: str) -> Result:
    """The whole test; see the module."""
    with system(model, workers=1, arena_bytes=ARENA_BYTES, device=device) as running:
        load, capacity = asyncio.run(_drive(running, 60 * minutes))
    result = _result(load, capacity, model.name, minutes)
    result.configuration["device"] = device
    return result


async def _drive(running: SystemRecord, seconds: float) -> tuple[Load, float]:
    async with grpc.aio.insecure_channel(running.inference, options=OPTIONS) as channel:
        stub = rpc.InferenceServiceStub(channel)
        first = Load(stub, random.Random(SEED))
        await first.closed_loop(CALLERS, CAPACITY_S / 4)  # warm up
        capacity = await first.closed_loop(CALLERS, min(CAPACITY_S, seconds / 4))
        log(f"bench: capacity {capacity:.1f} requests/s; now {OVERLOAD:g} times as many for {seconds:.0f} s")
        load = Load(stub, random.Random(SEED + 1))
        await load.open_loop(OVERLOAD * capacity, seconds, running)
        return load, capacity


def _result(load: Load, capacity: float, model: str, minutes: float) -> Result:
    configuration = {
        "model": model, "minutes": minutes, "overload": OVERLOAD, "callers_for_capacity": CALLERS, "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS, "arena_bytes": ARENA_BYTES,
    }  # fmt: skip
    result = Result("load", configuration, SEED, samples={"answered_s": load.answered_s, "refused_s": load.refused_s})
    result.samples |= {"retry_delay_s": load.delays_s}
    result.samples |= {"memory_at_s": [t for t, _ in load.memory], "memory_bytes": [m for _, m in load.memory]}
    sent = sum(load.codes.values())
    result.rows.append({
        "capacity_requests_per_s": capacity,
        "sent": sent,
        "codes": dict(load.codes),
        "answered_requests_per_s": load.codes["OK"] / (60 * minutes),
        "refusals_with_retry_delay": len(load.delays_s),
        "most_in_flight": load.most_in_flight,
        **{f"answered_p{p}_s": percentile(load.answered_s, p / 100) for p in (50, 95, 99) if load.answered_s},
        **{f"refused_p{p}_s": percentile(load.refused_s, p / 100) for p in (50, 99) if load.refused_s},
        "memory_growth": _growth([m for _, m in load.memory]),
    })  # fmt: skip
    result.ratios["answered_to_capacity"] = result.rows[0]["answered_requests_per_s"] / capacity
    return result


def _growth(values: list[int]) -> float | None:
    """Median of the last third to median of the middle third; the first third is warm-up. None for too few samples."""
    third = len(values) // 3
    return statistics.median(values[-third:]) / statistics.median(values[third : 2 * third]) if third else None


def render_load(result: Result) -> str:
    """The summary for people."""
    row, minutes = result.rows[0], result.configuration["minutes"]
    lines = [
        f"{row['sent']} requests in {minutes:g} minutes: {OVERLOAD:g} times the {row['capacity_requests_per_s']:.1f} a second it can do",
        f"answers: {', '.join(f'{code} {count}' for code, count in row['codes'].items())}",
        f"refusals that name a delay: {row['refusals_with_retry_delay']} of {row['codes'].get('RESOURCE_EXHAUSTED', 0)}",
        f"at most {row['most_in_flight']} in flight",
        *(f"{key}: {row[key]:.2f}" for key in row if key.startswith(("answered_", "refused_"))),
        f"memory, last third to middle third: {row['memory_growth']:.3f}" if row["memory_growth"] else "too short for a trend of memory",
    ]
    return "\n".join(lines)
