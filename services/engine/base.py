"""The contract of an engine: what runs the model inside a worker.

An engine takes checked requests and yields deltas. It owns the live KV cache, the batch and the model's thread; it reads blocks
from the store and publishes new ones through `kvstore.client`, and goes on without the store when that is slow or away.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar

from kvstore.errors import ConfigError

if TYPE_CHECKING:  # it brings torch, and the command line reads this module to check its arguments
    from kvstore.codecs import Profile
    from kvstore.layout import KVLayout


class CacheMode(Enum):
    """What a request may take from the store and leave in it."""

    USE = "use"
    READ_ONLY = "read_only"
    BYPASS = "bypass"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are chosen; checked where it is built (`services.worker.requests`).

    `seed` None draws one. `temperature` 0 is greedy. `top_k` 0 keeps all.
    """

    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, slots=True)
class GenerateSpec:
    """One checked request.

    Parameters
    ----------
    request_id : str
    tokens : tuple of int
        The prompt, at least one token, all within the vocabulary.
    sampling : SamplingParams
    tenant : str
        From the caller's credential; part of the namespace.
    cache_mode : CacheMode
    max_distortion : float
        Blocks with a worse relative squared error are not used; 0 takes any.
    store_deadline_s : float or None
        Most time to spend on the store before recomputing; None leaves it to the engine.
    press : str
        Name of a press, empty for none; `kv_tokens` is its budget.
    kv_tokens : int
    deadline : float or None
        Monotonic second (`time.monotonic`) at which the caller stops listening.
    """

    request_id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams
    tenant: str = "default"
    cache_mode: CacheMode = CacheMode.USE
    max_distortion: float = 0.0
    store_deadline_s: float | None = None
    press: str = ""
    kv_tokens: int = 0
    deadline: float | None = None


@dataclass(slots=True)
class CacheReport:
    """What the store gave to a request."""

    cached_tokens: int = 0
    blocks_hit: int = 0
    fidelity: int = 0
    distortion: float = 0.0
    bytes_fetched: int = 0


@dataclass(slots=True)
class Timing:
    """Milliseconds; `ttft_ms` and `total_ms` count from the request's arrival."""

    queue_ms: float = 0.0
    lookup_ms: float = 0.0
    fetch_ms: float = 0.0
    prefill_ms: float = 0.0
    ttft_ms: float = 0.0
    total_ms: float = 0.0


@dataclass(slots=True)
class Delta:
    """New text and tokens of one request. `finish_reason` is empty but in the last, which carries the reports.

    Text holds back what may yet become a stop string or an incomplete character, so joined texts are the whole answer.
    """

    text: str
    tokens: list[int]
    finish_reason: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cache: CacheReport = field(default_factory=CacheReport)
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What the engine serves; `codec` is what new blocks are written with now."""

    model: str
    fingerprint: str
    context_window: int
    vocab_size: int
    layout: KVLayout
    block_tokens: int
    codec: str
    presses: tuple[str, ...]
    engine: str


class Engine(ABC):
    """Base of engines. `start` loads and `stop` frees; the constructor only stores its arguments."""

    name: ClassVar[str]
    info: ModelInfo
    #: Told the codec's number and the profile's digest of a block that could not be read for want of its profile.
    on_unknown_profile: Callable[[int, bytes], None] | None = None

    @abstractmethod
    async def start(self) -> None:
        """Load the model, connect to the store, warm up. Raises ConfigError for a model that cannot be served."""

    @abstractmethod
    async def stop(self) -> None:
        """Finish what runs, flush the publish queue for a bounded time, free everything."""

    async def use_profile(self, profile: Profile, codec: str, options: dict[str, Any], *, write: bool) -> None:
        """Read blocks of `codec` with `profile` from now on and, with `write`, write new ones so, too. Running requests go on.

        Raises
        ------
        ConcertinaError
            Where they do not fit the model, or the engine (like this default) knows nothing of profiles.
        """
        raise ConfigError(f"engine {self.name!r} reads no blocks with profiles")

    @abstractmethod
    def tokenize(self, text: str) -> list[int]:
        """Token ids of plain text, as it is, without special tokens."""

    @abstractmethod
    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation with the generation prompt. Raises InvalidInputError for roles the template refuses."""

    @abstractmethod
    def generate(self, spec: GenerateSpec) -> AsyncIterator[Delta]:
        """Run one request. Closing the iterator (or its deadline passing) frees its batch slot at the next step.

        Raises
        ------
        CapacityError
            At once, when the queue is full.
        DeadlineError
            When `spec.deadline` passes first.
        """
