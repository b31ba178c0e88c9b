"""Settings of the engine `transformers`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from kvstore.errors import ConfigError

#: What `EngineConfig.dtype` may say; `auto` picks what this machine computes fastest (`services.engine.loading`).
DTYPE_NAMES = ("auto", "bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How one engine runs.

    Parameters
    ----------
    model : str
        A directory in Hugging Face form, as `services.model.resolve_model` gives it.
    name : str
        What the model is called in answers; the directory's name by default.
    device : str
        ``cpu`` or ``cuda``.
    dtype : str
        Element type of weights and live cache: `auto`, `bfloat16`, `float16`, `float32`.
    threads : int
        Threads that the model may use on the CPU; 0 leaves torch as it is.
    codec : str
    codec_options : dict
        How new blocks are encoded. Blocks of any codec without a profile are read.
    profile : Profile or None
        For codecs that need one.
    block_tokens : int
        Tokens of a block, and of the tile in which prompts are computed.
    max_batch : int
        Requests that hold live KV at once.
    max_queue : int
        Requests that may wait beyond those; more are refused with CapacityError.
    max_live_tokens : int
        Tokens of live KV that all requests may hold together; 0 is `max_batch` times the context window, or what memory there is for.
    max_context : int
        Longest prompt and answer together; 0 takes the model's own limit.
    prefill_tiles : int
        Most tiles of prompt computed in one step when nobody waits for a token.
    busy_prefill_tiles : int
        The same while streams are running; it bounds how late a cancellation or a deadline is noticed.
    prefill_rows : int
        Rows of every prefill step on a GPU, where it costs the same however many tiles are in it; rounded down to a power of two times
        `block_tokens`, at most `prefill_tiles` tiles. 0 chooses by the size of the model.
    cuda_graphs : bool
        Whether steps on a GPU are recorded once and replayed, where that is possible and gives the same bits.
    store_floor_s, store_ceiling_s : float
        Bounds of the time that a request may spend on the store; between them it is half of what recomputing would take.
    always_fetch : bool
        Fetch even where recomputing has been measured to be quicker; for measurements and tests.
    publish_queue_blocks : int
        Blocks that may wait to be encoded, at most a quarter of the live cache; more are dropped.
    publish_share : float
        Most of the model's time that encoding may take while requests are running.
    """

    model: str
    name: str = ""
    device: str = "cpu"
    dtype: str = "auto"
    threads: int = 0
    codec: str = "int8"
    codec_options: dict[str, Any] = field(default_factory=dict)
    profile: Any = None
    block_tokens: int = 64
    max_batch: int = 8
    max_queue: int = 64
    max_live_tokens: int = 0
    max_context: int = 0
    prefill_tiles: int = 16
    busy_prefill_tiles: int = 2
    prefill_rows: int = 0
    cuda_graphs: bool = True
    store_floor_s: float = 0.05
    store_ceiling_s: float = 10.0
    always_fetch: bool = False
    publish_queue_blocks: int = 1024
    publish_share: float = 0.25

    def __post_init__(self) -> None:
        if self.dtype not in DTYPE_NAMES:
            raise ConfigError(f"dtype {self.dtype!r} is not known; use one of {', '.join(DTYPE_NAMES)}")
        if self.device.partition(":")[0] not in ("cpu", "cuda"):
            raise ConfigError(f"device {self.device!r} is not known; use cpu or cuda")
        for name, low, high in (
            ("threads", 0, 1024), ("block_tokens", 1, 4096), ("max_batch", 1, 1024), ("max_queue", 0, 1 << 20), ("max_context", 0, 1 << 24),
            ("max_live_tokens", 0, 1 << 40), ("prefill_tiles", 1, 1024), ("busy_prefill_tiles", 1, 1024),
            ("publish_queue_blocks", 0, 1 << 24), ("prefill_rows", 0, 1 << 16),
        ):  # fmt: skip
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                raise ConfigError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
        if not 0 < self.store_floor_s <= self.store_ceiling_s:
            raise ConfigError("store_floor_s must be above 0 and at most store_ceiling_s")
        if not 0 < self.publish_share <= 1:
            raise ConfigError(f"publish_share must be above 0 and at most 1, not {self.publish_share}")
