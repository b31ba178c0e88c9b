"""An asyncio loop on virtual time: nothing sleeps, nothing runs beside it, the order of steps follows from the program alone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

#: The host on which the running task lives; tasks inherit it from whoever made them.
HOST: ContextVar[str] = ContextVar("host", default="world")
#: What is given to a thread is done after so long.
THREAD_S = 0.0003
#: So many turns without the time moving mean that something spins.
MAX_TURNS_AT_REST = 200_000


class StuckError(RuntimeError):
    """The program waits for what can never come, or spins: a hang, found at once."""


class VirtualLoop(asyncio.BaseEventLoop):
    """See the module. `tasks` holds the unfinished tasks of each host, in the order of their making."""

    def __init__(self) -> None:
        super().__init__()
        self._selector = self  # BaseEventLoop asks it to wait for sockets; here waiting is moving the clock
        self._now = 0.0
        self._turns = 0
        self.tasks: dict[str, dict[asyncio.Task, None]] = {}
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now

    def select(self, timeout: float | None) -> list:
        """Move the clock to the next timer."""
        if timeout is None:
            raise StuckError(f"at {self._now:.3f} s nothing is scheduled any more")
        self._turns = 0 if timeout else self._turns + 1
        if self._turns > MAX_TURNS_AT_REST:
            raise StuckError(f"the program spins at {self._now:.3f} s")
        self._now += timeout
        return []

    def run_in_executor(self, executor: Any, func: Callable, *args: Any) -> asyncio.Future:
        """Run `func` a moment later, whole: a thread's work lies between the steps of others, in the order of asking."""
        future = self.create_future()
        self.call_later(THREAD_S, self._run_now, future, func, args)
        return future

    @staticmethod
    def _run_now(future: asyncio.Future, func: Callable, args: tuple) -> None:
        if future.cancelled():
            return
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - handed on to whoever awaits it
            future.set_exception(error)

    def kill(self, host: str) -> None:
        """End all tasks of a host, as a crash would; what they await is cancelled."""
        for task in list(self.tasks.get(host, ())):
            task.cancel()

    def close(self) -> None:
        """End what still runs, so that nothing outlives its world."""
        while left := [task for host in self.tasks.values() for task in host]:
            for task in left:
                task.cancel()
            self.run_until_complete(asyncio.wait(left))
        self.run_until_complete(self.shutdown_asyncgens())
        super().close()

    def _make_task(self, loop: asyncio.AbstractEventLoop, coroutine: Any, **options: Any) -> asyncio.Task:
        task = asyncio.Task(coroutine, loop=loop, **options)
        mine = self.tasks.setdefault(HOST.get(), {})
        mine[task] = None
        task.add_done_callback(lambda done: mine.pop(done, None))
        return task

    def _process_events(self, events: list) -> None:
        """There are none."""

    def _write_to_self(self) -> None:
        """Nobody else can wake this loop."""


def on_host(loop: VirtualLoop, host: str, coroutine: Any) -> asyncio.Task:
    """A task of `host`."""
    token = HOST.set(host)
    try:
        return loop.create_task(coroutine)
    finally:
        HOST.reset(token)
