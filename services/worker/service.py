"""What both protocols share: who calls, what is asked, until when, and the count of what became of it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Iterable, Iterator
from dataclasses import replace

from kvstore.clock import Clock, SystemClock
from kvstore.errors import InvalidInputError, status_name
from kvstore.metrics import Metrics
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.engine.base import Delta, Engine
from services.worker.faults import Details, describe
from services.worker.requests import to_spec
from services.worker.tenants import Tenants

#: Metadata of gRPC or header of HTTP: milliseconds that the caller waits from now on. `services.worker.proxy` makes it of gRPC's own
#: deadline, which Serve does not hand on.
TIMEOUT_HEADER = "x-request-timeout-ms"
#: Bounds of the delay after which a caller that found the queue full should try again.
MIN_RETRY_S, MAX_RETRY_S = 1.0, 60.0
#: Weight of a new interval between two answers.
WEIGHT = 0.2


class Service:
    """Runs checked requests on one engine.

    Parameters
    ----------
    engine : Engine
        Started before the first request.
    tenants : Tenants
    metrics : Metrics
    clock : Clock, optional
    """

    def __init__(self, engine: Engine, tenants: Tenants, metrics: Metrics, clock: Clock | None = None) -> None:
        self.engine, self.tenants, self.clock = engine, tenants, clock or SystemClock()
        self._metrics = metrics
        self._running = 0
        #: Moving average of the seconds between two answers that ended while others were waiting.
        self._interval_s = MIN_RETRY_S
        self._ended_at: float | None = None

    async def deltas(self, request: pb.GenerateRequest, metadata: Iterable[tuple[str, str]]) -> AsyncGenerator[Delta, None]:
        """Check a request and run it. Closing this closes the engine's iterator, which frees the batch slot.

        `metadata` has the credential and the time that the caller waits.
        """
        metadata = list(metadata)
        spec = to_spec(request, self.engine, self.tenants.of(metadata))
        spec = replace(spec, deadline=self._deadline(metadata))
        async with contextlib.aclosing(self.engine.generate(spec)) as deltas:
            self._running += 1
            try:
                async for delta in deltas:
                    yield delta
            finally:
                self._running -= 1
            self._ended()

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a call by its status. Serve cancels a call when its caller has gone; that is no error of ours."""
        code = "OK"
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            code = "CANCELLED"
            raise
        except Exception as error:
            code = status_name(error)
            raise
        finally:
            self._metrics.requests.labels(code=code).inc()

    def fault(self, error: BaseException) -> tuple[str, Details]:
        """Status and details of an error, with the delay that the pace of the last answers suggests: until half the line is gone."""
        return describe(error, min(max(self._interval_s * self._running / 2, MIN_RETRY_S), MAX_RETRY_S))

    def _ended(self) -> None:
        now = self.clock.now()
        if self._running and self._ended_at is not None:
            self._interval_s += WEIGHT * (now - self._ended_at - self._interval_s)
        self._ended_at = now

    def _deadline(self, metadata: list[tuple[str, str]]) -> float | None:
        text = next((value for name, value in metadata if name.lower() == TIMEOUT_HEADER), None)
        if text is None:
            return None
        try:
            wait_s = float(text) / 1000
        except ValueError:
            wait_s = math.nan
        if not 0 <= wait_s < math.inf:
            raise InvalidInputError(f"{TIMEOUT_HEADER} must be a number of milliseconds of at least 0, not {text[:40]!r}")
        return self.clock.now() + wait_s
