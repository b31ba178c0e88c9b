"""The model's thread: it alone touches tensors of running requests.

Each turn takes what has arrived, drops who is gone or late, runs one step of the scheduler's plan, and with what time is left
encodes blocks for the store.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable

from kvstore.clock import Clock
from kvstore.codecs import Codec
from kvstore.errors import CapacityError, ConcertinaError, DeadlineError
from kvstore.identity import block_key
from kvstore.metrics import Metrics

from .base import CacheReport, Delta
from .job import Job, Preempted
from .prefixes import LiveBlock, LivePrefixes
from .rates import Rates
from .runner import NextToken, PromptTile, Runner
from .sampler import likeliest
from .scheduler import Entry, Plan, Scheduler
from .writer import BlockWriter, Chain

#: While streams run, a prefill step pauses for a decode step whenever it has taken so many times as long as one.
PREFILL_SLICE = 2.5
#: Longest sleep without work, so that deadlines of waiting requests are noticed.
IDLE_S = 0.05
log = logging.getLogger(__name__)


class Core:
    """Runs jobs until `stop`. `submit`, `cancel` and `stop` may be called from any thread; the rest is the model thread's.

    Parameters
    ----------
    runner : Runner
    scheduler : Scheduler
    prefixes : LivePrefixes
        Told of blocks that are computed, and of requests that end.
    writer : BlockWriter or None
        None publishes nothing.
    eos : frozenset of int
    """

    def __init__(
        self, runner: Runner, scheduler: Scheduler, prefixes: LivePrefixes, writer: BlockWriter | None, eos: frozenset[int], rates: Rates,
        metrics: Metrics, clock: Clock,
    ) -> None:  # fmt: skip
        self._runner, self._scheduler, self._writer = runner, scheduler, writer
        self._prefixes, self._eos, self._rates = prefixes, eos, rates
        self._metrics, self._clock = metrics, clock
        self._jobs: dict[str, Job] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._decoded_at = self._decode_s = 0.0
        self._stopping: float | None = None
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Queue a job; its sink hears from it until it ends. After `stop` it hears a CapacityError."""
        self._command(lambda: self._add(job))

    def cancel(self, id_: str) -> None:
        """Drop a job at the next step and free what it held; unknown ones are ignored."""
        self._command(lambda: self._forget(id_))

    def write_with(self, codec: Codec) -> None:
        """Encode blocks with `codec` from the next step on."""
        if self._writer is not None:
            self._command(lambda: setattr(self._writer, "codec", codec))

    def stop(self, flush_s: float) -> None:
        """End running jobs as cancelled, encode what waits for at most `flush_s`, and wait for the thread."""
        self._command(lambda: setattr(self, "_stopping", self._clock.now() + flush_s))
        if self._thread.is_alive():
            self._thread.join()

    def _command(self, call: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(call)
            self._wake.notify()
            if self._ended:
                self._take_commands()

    # -------------------------------------------------------------------------------------------------- the model's thread

    def _run(self) -> None:
        while self._stopping is None:
            self._take_commands()
            self._drop_late()
            plan = self._scheduler.plan()
            if plan.prefill or plan.decode:
                self._step(plan)
            if self._writer is not None and not plan.prefill and self._writer.due(busy=bool(plan.decode)):
                self._writer.work(busy=bool(plan.decode))
            elif not plan.prefill and not plan.decode:
                with self._wake:
                    self._wake.wait_for(lambda: self._commands, IDLE_S)
        with self._wake:
            self._ended = True
            self._take_commands()
        for job in list(self._jobs.values()):
            self._end(job, "", [], "cancelled")
        while self._writer is not None and len(self._writer) and self._clock.now() < self._stopping:
            self._writer.work(busy=False)

    def _take_commands(self) -> None:
        while self._commands:
            self._commands.popleft()()

    def _add(self, job: Job) -> None:
        if self._ended:
            self._release(job)
            job.sink(CapacityError("the engine is stopping; send the request to another worker"))
            return
        self._jobs[job.id] = job
        self._scheduler.add(Entry(job.id, len(job.spec.tokens), job.prefix.tokens))

    def _forget(self, id_: str) -> None:
        job = self._jobs.pop(id_, None)
        if job is not None:
            self._release(job)
        self._scheduler.remove(id_)
        self._note_memory()

    def _release(self, job: Job) -> None:
        self._prefixes.end(job.id)
        job.kv.release()

    def _drop_late(self) -> None:
        now = self._clock.now()
        for job in [j for j in self._jobs.values() if j.spec.deadline is not None and now >= j.spec.deadline]:
            self._fail(job, DeadlineError(f"the deadline passed after {len(job.output)} tokens of the answer"))

    def _step(self, plan: Plan) -> None:
        """One forward. What goes wrong in it ends the requests in it, and no others."""
        try:
            if plan.prefill:
                self._prefill(plan)
            else:
                self._decode(plan)
        except Exception as error:
            log.exception("a step failed")
            self._fail_all([span[0] for span in plan.prefill] + list(plan.decode), error)
        self._note_memory()

    def _fail_all(self, ids: list[str], error: Exception) -> None:
        if not isinstance(error, ConcertinaError):
            error = ConcertinaError(f"the model failed in a step: {type(error).__name__}; the request can be sent again")
        for id_ in dict.fromkeys(ids):
            if id_ in self._jobs:
                self._fail(self._jobs[id_], error)

    def _prefill(self, plan: Plan) -> None:
        began = self._clock.now()
        tiles, finished = [], []
        for id_, start, stop in plan.prefill:
            job = self._jobs[id_]
            job.began = began if job.began is None else job.began
            whole = stop == len(job.spec.tokens)
            tiles.append(PromptTile(job.kv, start, job.spec.tokens[start:stop], logits=whole, press=job.watcher))
            if whole:
                finished.append(job)
        waited = any(tile.kv.coming is not None for tile in tiles)
        logits = self._runner.prefill(tiles, self._decode_within)
        self._end_coming({tile[0] for tile in plan.prefill})
        for id_, start, stop in plan.prefill:
            if id_ in self._jobs:
                self._scheduler.computed(id_, stop)
                self._came(self._jobs[id_], start, stop)
        best = likeliest(logits)
        for row, job in enumerate(finished):
            if job.id in self._jobs:
                self._publish(job, len(job.spec.tokens))
                self._next_token(job, logits[row], best[row])
        rows = sum(len(tile.tokens) for tile in tiles)
        full = self._runner.shapes.prefill or self._runner.tile
        if rows % full == 0 and not waited:  # few rows have a rate of their own
            self._rates.prefilled(rows, self._clock.now() - began)

    def _end_coming(self, ids: set[str]) -> None:
        """A step has gone through all layers: what was coming is there. Who computed on what was lost does so again, without the store."""
        for job in [self._jobs[id_] for id_ in sorted(ids)]:
            coming, job.kv.coming = job.kv.coming, None
            if coming is not None and coming.lost:
                job.compute, job.prefix.report = len(job.spec.tokens), CacheReport()
                self._forget(job.id)
                job.sink(Preempted())

    def _decode(self, plan: Plan) -> None:
        self._advance(self._with_room([self._jobs[id_] for id_ in plan.decode]))

    def _decode_within(self) -> None:
        """In the middle of a prefill step: decode, if it is time.

        Nobody gives way to others here, since the pages of who is being computed are written to; who lacks a page waits for the step's
        end.
        """
        if self._clock.now() - self._decoded_at < PREFILL_SLICE * self._decode_s * self._scheduler.patience():
            return
        jobs = [job for job in map(self._jobs.__getitem__, self._scheduler.next_decode()) if self._has_room(job)]
        try:
            self._advance(jobs)
        except Exception as error:
            log.exception("a decode step within a prefill step failed")
            self._fail_all([job.id for job in jobs], error)

    def _advance(self, jobs: list[Job]) -> None:
        """Compute the next token of each; all have room for it."""
        if not jobs:
            return
        began = self._clock.now()
        self._metrics.batch_size.observe(len(jobs))
        logits = self._runner.decode([NextToken(job.kv, job.output[job.step - 1], job.position, job.watcher) for job in jobs])
        best = likeliest(logits)
        for row, job in enumerate(jobs):
            self._next_token(job, logits[row], best[row])
        self._decoded_at = self._clock.now()
        self._decode_s = self._decoded_at - began

    def _next_token(self, job: Job, logits, best: int) -> None:
        """Choose, tell, and end the job or make room for its next token."""
        job.step += 1
        if job.step <= len(job.output):  # said before a preemption
            self._press(job)
            return
        token = job.sampler.choose(logits, len(job.spec.tokens) + len(job.output), best)
        job.output.append(token)
        now = self._clock.now()
        if job.last_token is None:
            job.first_token = now
            self._metrics.ttft_seconds.observe(now - job.arrived)
        else:
            self._metrics.inter_token_seconds.observe(now - job.last_token)
        job.last_token = now
        if token in self._eos and not job.spec.sampling.ignore_eos:
            self._end(job, job.text.finish(), [token], "stop")
            return
        text = job.text.push(token)
        if job.text.stopped:
            self._end(job, text, [token], "stop")
        elif len(job.output) >= job.max_new_tokens:
            self._end(job, text + job.text.finish(), [token], "stop" if job.text.stopped else "length")
        else:
            self._press(job)
            job.sink(Delta(text, [token]))

    def _press(self, job: Job) -> None:
        if job.press is None or job.kv.length < job.press.budget:
            return
        self._prefixes.end(job.id)
        job.pressed = True
        # Room for a sixteenth of the budget, so that keeping is paid once in so many tokens.
        try:
            job.kv.keep(job.press.keep(job.kv, max(1, job.press.budget // 16)))
        except CapacityError:
            self._preempt(job)

    def _came(self, job: Job, start: int, stop: int) -> None:
        """The prompt's tokens from `start` to `stop` are computed; whole blocks of them may be shared."""
        size = self._runner.tile
        if stop % size == 0:
            self._prefixes.came(job.id, start // size, [LiveBlock(job.kv.page_ids[start // size], job.prefix.provenance)])

    def _with_room(self, jobs: list[Job]) -> list[Job]:
        """Those of `jobs` that have a page for their next token; while pages are short, the latest to arrive loses its own."""
        for job in jobs:
            while job.id in self._jobs and not self._has_room(job):
                if self._writer is not None and len(self._writer):
                    self._writer.work(busy=False)  # blocks that wait to be encoded hold their pages
                else:
                    self._preempt(max(self._jobs.values(), key=lambda j: j.order))
        return [job for job in jobs if job.id in self._jobs]

    @staticmethod
    def _has_room(job: Job) -> bool:
        try:
            job.kv.reserve(job.kv.length + 1)
        except CapacityError:
            return False
        return True

    def _preempt(self, job: Job) -> None:
        """Publish what there is of the job, give up its pages, and let it come again: it is computed, or read, anew to where it was.

        Tokens of the answer are given to the model one by one again, as they were at first. So the answer goes on as if nothing had
        happened, where the store is lossless; from another store the job takes no more than it did at first.
        """
        log.info("request %s gives way to older ones after %d tokens", job.spec.request_id, len(job.output))
        self._publish_all(job)
        if self._writer is not None and self._writer.codec.name != "raw":
            job.compute = max(job.compute, len(job.spec.tokens) - job.prefix.tokens)
        self._forget(job.id)
        job.sink(Preempted())

    def _end(self, job: Job, text: str, tokens: list[int], reason: str) -> None:
        self._publish_all(job)
        self._forget(job.id)  # before the last word, so that whoever heard it finds the room free
        job.sink(job.last_delta(text, tokens, reason, self._clock.now()))

    def _fail(self, job: Job, error: Exception) -> None:
        self._forget(job.id)
        job.sink(error)

    def _publish_all(self, job: Job) -> None:
        """Publish what has been computed, as far as the codec allows.

        K and V of generated tokens come from other kernels than a prompt's and differ in the last bits, so a lossless codec must not have
        them: what it returns stands in for a prompt's own.
        """
        if self._writer is not None and not job.pressed:
            self._publish(job, job.kv.length if self._writer.codec.name != "raw" else min(job.kv.length, len(job.spec.tokens)))

    def _publish(self, job: Job, length: int) -> None:
        """Offer the whole blocks up to `length` that the store did not give and that were not offered yet."""
        size = self._runner.tile
        first, last = job.published // size, length // size
        if self._writer is None or not job.prefix.publish or last <= first:
            return
        tokens = (*job.spec.tokens, *job.output)[first * size : last * size]
        keys = [job.parent]
        for at in range(0, len(tokens), size):
            known = first + at // size
            in_prompt = known < len(job.prefix.keys)
            keys.append(job.prefix.keys[known] if in_prompt else block_key(job.prefix.namespace, keys[-1], tokens[at : at + size]))
        job.published, job.parent = last * size, keys[-1]
        prefix, kv = job.prefix, job.kv
        chain = Chain(
            kv.pool, kv.page_ids[first:last], first * size, tokens, keys, prefix.namespace, prefix.provenance, len(job.spec.tokens)
        )  # fmt: skip
        self._writer.offer(chain)

    def _note_memory(self) -> None:
        self._metrics.live_kv_bytes.set(self._runner.pool.used_bytes)
