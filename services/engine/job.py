"""One request on its way through the engine, as the model's thread sees it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.block import Provenance
from kvstore.identity import NO_PARENT

from .base import CacheReport, Delta, GenerateSpec, Timing
from .live import LiveKV
from .presses.base import Press
from .sampler import Sampler
from .textstream import TextStream

#: Of a prefix that was computed here.
EXACT = Provenance()
#: Takes deltas, and at most one error, which ends them. Called from the model's thread.
Sink = Callable[[Delta | Exception], None]


class Preempted(Exception):
    """Comes instead of a delta: the job's pages went to an older request, and it is to be submitted again."""


@dataclass(slots=True)
class Prefix:
    """What of a prompt is already in `kv`: `tokens` of them, a multiple of the block, and how good that is.

    `namespace` and `keys` (of all the prompt's whole blocks) name what may be shared; with `publish` the store gets it, too.
    """

    kv: LiveKV
    tokens: int = 0
    namespace: bytes = b""
    publish: bool = False
    keys: list[bytes] = field(default_factory=list)
    provenance: Provenance = EXACT
    report: CacheReport = field(default_factory=CacheReport)
    lookup_s: float = 0.0
    fetch_s: float = 0.0

    def adopt(self, provenance: Provenance, blocks: int, block_tokens: int) -> None:
        """Begin with blocks that another request has in use."""
        self.tokens, self.provenance = blocks * block_tokens, provenance
        self.report.cached_tokens, self.report.blocks_hit = self.tokens, blocks
        self.report.fidelity = provenance.fidelity
        self.report.distortion = max(provenance.distortion.keys, provenance.distortion.values)


@dataclass(slots=True)
class Job:
    """A request with its cache, its choices and its text. Times are the clock's seconds."""

    id: str
    #: Number of arrival; the latest is the first to be preempted.
    order: int
    spec: GenerateSpec
    prefix: Prefix
    sampler: Sampler
    text: TextStream
    sink: Sink
    arrived: float
    #: How many of the prompt's last tokens are computed whatever is cached; at least 1.
    compute: int = 1
    press: Press | None = None
    max_new_tokens: int = 1
    output: list[int] = field(default_factory=list)
    #: How many tokens of the answer have been given to the model, or will be in its next step; fewer than there are of them after a
    #: preemption, until the model has seen them again.
    step: int = 0
    #: Tokens whose blocks have been handed to the writer, or came from the store.
    published: int = 0
    #: Key of the last of those blocks.
    parent: bytes = NO_PARENT
    began: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    #: Whether a press has dropped tokens, so that the cache holds no whole blocks any more.
    pressed: bool = False

    @property
    def kv(self) -> LiveKV:
        return self.prefix.kv

    @property
    def watcher(self) -> Press | None:
        """The press, where it looks at queries."""
        return self.press if self.press is not None and self.press.queries else None

    @property
    def position(self) -> int:
        """Position in the sequence of the token that the model is given next."""
        return len(self.spec.tokens) + self.step - 1

    def place(self, prefix: Prefix, block_tokens: int) -> None:
        """Begin, or begin again, with what of the prompt is already there."""
        blocks = prefix.tokens // block_tokens
        if self.began is not None:  # what is told of the store is what it gave at first
            prefix.report, prefix.lookup_s, prefix.fetch_s = self.prefix.report, self.prefix.lookup_s, self.prefix.fetch_s
        self.prefix, self.step, self.pressed = prefix, 0, False
        self.published, self.parent = prefix.tokens, prefix.keys[blocks - 1] if blocks else NO_PARENT

    def timing(self, now: float) -> Timing:
        """Milliseconds so far."""
        began = self.began if self.began is not None else now
        first = self.first_token if self.first_token is not None else now
        store_s = self.prefix.lookup_s + self.prefix.fetch_s
        return Timing(
            queue_ms=1e3 * max(0.0, began - self.arrived - store_s),
            lookup_ms=1e3 * self.prefix.lookup_s,
            fetch_ms=1e3 * self.prefix.fetch_s,
            prefill_ms=1e3 * (first - began),
            ttft_ms=1e3 * (first - self.arrived),
            total_ms=1e3 * (now - self.arrived),
        )

    def last_delta(self, text: str, tokens: list[int], reason: str, now: float) -> Delta:
        """The delta that ends the answer, with all reports."""
        return Delta(text, tokens, reason, len(self.spec.tokens), len(self.output), self.prefix.report, self.timing(now))
