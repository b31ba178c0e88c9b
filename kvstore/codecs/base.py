"""The contract of a codec: K and V of a block to bytes, and back (DESIGN §5).

`Codec` is a template: it checks what goes in and what comes out, so that an implementation is only the mathematics of `_encode`
and `_decode`. Adding one is one file and one row in `kvstore.codecs.CODECS`.

Shape suffixes: B block, L model layer, H KV head, T token, D head dim. "Layer" alone means a layer of precision.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, ClassVar

import numpy as np
import torch

from kvstore.block import MAX_FIDELITIES, MAX_TOKENS, BlockHeader, Buffer, Distortion, EncodedBlock, LayerInfo
from kvstore.errors import ConfigError, CorruptBlockError, InvalidInputError, LayoutMismatchError
from kvstore.identity import NO_PARENT
from kvstore.layout import DTYPES, KVLayout, dtype_name

from .parallel import begin
from .profile import Profile

Tokens = Sequence[int] | np.ndarray | torch.Tensor
OnLayers = Callable[[int], None]
#: Sections of smaller payloads are not worth their messages: those of 1 MiB take twice the time of whole blocks, those of 8 MiB no more.
SECTIONED_FROM_BYTES = 2 << 20


@dataclass(frozen=True, slots=True)
class KVSample:
    """What a model computed for one run of tokens; calibration's input.

    Parameters
    ----------
    keys, values : Tensor [L, H, T, D]
        Keys after RoPE.
    start : int
        Position of the first token.
    tokens : Tensor [T], int64
    key_grads, value_grads : Tensor [L, H, T, D] or None
        Gradient of a sampled log-likelihood with respect to `keys` and `values`.
    """

    keys: torch.Tensor
    values: torch.Tensor
    start: int
    tokens: torch.Tensor
    key_grads: torch.Tensor | None = None
    value_grads: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Coded:
    """One block as an implementation hands it to the template.

    Parameters
    ----------
    layers : tuple of bytes
        Payload of each layer of precision, base first.
    distortions : tuple of Distortion
        Error of what `_decode` would give from the layers up to this one, against what was encoded.
    divergences : tuple of float
        The profile's estimate of the harm at each fidelity, nats a token; empty when there is none.
    """

    layers: tuple[Buffer, ...]
    distortions: tuple[Distortion, ...]
    divergences: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Stored:
    """One verified block as the template hands it to `_decode`: only the layers that were asked for."""

    start: int
    tokens: int
    layers: tuple[memoryview, ...]


class Codec(ABC):
    """Base of codecs. Instances are immutable and may be shared by threads.

    Parameters
    ----------
    layout : KVLayout
    profile : Profile or None
        Kept only by codecs with `uses_profile`; they refuse None.
    config : Config
        The codec's own frozen dataclass of options.
    """

    name: ClassVar[str]
    #: Number in the block header; never reused for another format.
    wire_id: ClassVar[int]
    uses_profile: ClassVar[bool] = False
    #: Whether `encode` and `decode` need the block's token ids.
    needs_tokens: ClassVar[bool] = False
    #: Whether `decode` has the model's lower layers long before the upper ones.
    layerwise: ClassVar[bool] = False
    #: Whether the payload is that of the model's layers, one behind the other, all of one size: its sections can be decoded alone.
    layer_major: ClassVar[bool] = False
    #: Bound on the error of any value, as a share of the block's largest |K| or |V|; None where the rate that is asked for decides.
    worst_error: ClassVar[float | None] = None

    @dataclass(frozen=True)
    class Config:
        """Options; none by default."""

    def __init__(self, layout: KVLayout, profile: Any = None, config: Any = None) -> None:
        if self.uses_profile and not isinstance(profile, Profile):
            given = "" if profile is None else f", not a {type(profile).__name__} (see Profile.load)"
            raise ConfigError(f"codec {self.name!r} needs a profile{given}; make one with `concertina calibrate`, or use 'int8'")
        self.layout = layout
        self.profile = profile if self.uses_profile else None
        self.config = self.Config() if config is None else config

    @property
    def profile_digest(self) -> bytes:
        """What stands in the header of each block: 32 bytes, zero without a profile."""
        return self.profile.digest if self.profile is not None else NO_PARENT

    # ------------------------------------------------------------------------------------------------ for implementations

    @abstractmethod
    def _encode(
        self, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, starts: Sequence[int], tokens_BT: torch.Tensor | None
    ) -> Iterable[Coded]:
        """Encode finite tensors of the layout's dtype, one result a block. Deterministic."""

    @abstractmethod
    def _decode(self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> None:
        """Write every value of the two outputs (layout's dtype, any strides but a dense last dimension).

        Raises
        ------
        CorruptBlockError
            For payloads that `_encode` cannot have written; before anything is allocated that depends on their content.
        """

    def _decode_by_layers(
        self, blocks: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor, on_layers: OnLayers
    ) -> None:
        """As `_decode`, and say how many of the model's first layers are done; for codecs that are `layerwise`, else all at once."""
        self._decode(blocks, tokens_BT, k_BLHTD, v_BLHTD)
        on_layers(self.layout.layers)

    def _decode_when_ready(
        self, blocks: Sequence[EncodedBlock], stored: Sequence[Stored], tokens_BT: torch.Tensor | None, k_BLHTD: torch.Tensor,
        v_BLHTD: torch.Tensor, on_layers: OnLayers, ready: OnLayers | None,
    ) -> None:  # fmt: skip
        """As `_decode_by_layers`, of payloads of which `ready` says what is there; all of it without one."""
        if ready is not None:
            ready(self.layout.layers)
        self._decode_by_layers(stored, tokens_BT, k_BLHTD, v_BLHTD, on_layers)

    def _layer_bytes(self, start: int, tokens: int) -> tuple[int, ...] | None:
        """Exact bytes of each layer of precision, for formats of fixed size; None for others. Checked before `_decode`."""
        return None

    # ------------------------------------------------------------------------------------------------------------- encode

    @torch.no_grad()
    def encode(
        self, keys: torch.Tensor, values: torch.Tensor, *, start: int | Sequence[int], tokens: Tokens | None = None
    ) -> EncodedBlock | list[EncodedBlock]:
        """Encode one block, or a batch of blocks of the same length, on the tensors' device.

        Parameters
        ----------
        keys, values : Tensor [L, H, T, D] or [B, L, H, T, D]
            float16, bfloat16 or float32; converted to the layout's dtype first. Keys after RoPE.
        start : int, or one int a block
            Position of each block's first token.
        tokens : int [T] or [B, T], optional
            Token ids, where the codec predicts from them.

        Returns
        -------
        EncodedBlock, or a list of them for a batch. Identity (key, namespace, parent) is still zero: see `with_identity`.

        Raises
        ------
        InvalidInputError
            For NaN or Inf, missing tokens, or a start out of range.
        LayoutMismatchError
            For tensors of another shape than the layout's.
        """
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            raise InvalidInputError(f"keys and values must be tensors, not {type(keys).__name__} and {type(values).__name__}")
        single = keys.ndim == 4
        keys, values = self._checked("keys", keys), self._checked("values", values)
        if keys.shape != values.shape or keys.device != values.device:
            raise LayoutMismatchError(f"keys {list(keys.shape)} on {keys.device} and values {list(values.shape)} on {values.device} differ")
        count, length = keys.shape[0], keys.shape[3]
        starts = self._starts(start, count)
        coded = self._encode(keys, values, starts, self._tokens(tokens, count, length))
        pairs = zip(coded, starts, strict=True)
        if keys.device.type == "cpu":
            blocks = [self._block(one, at, length) for one, at in pairs]
        else:  # one thread's checksums would take longer than the device and the bus do
            blocks = begin(lambda pair: self._block(*pair, length), pairs)()
        return blocks[0] if single else blocks

    def _checked(self, what: str, x: torch.Tensor) -> torch.Tensor:
        lay = self.layout
        if x.ndim not in (4, 5) or (*x.shape[-4:-2], x.shape[-1]) != (lay.layers, lay.kv_heads, lay.head_dim):
            want = f"[{lay.layers}, {lay.kv_heads}, tokens, {lay.head_dim}]"
            raise LayoutMismatchError(f"{what} {list(x.shape)} do not fit the layout {want}, with or without a leading batch dimension")
        if not 1 <= x.shape[-2] <= MAX_TOKENS or (x.ndim == 5 and not x.shape[0]):
            raise InvalidInputError(f"{what} {list(x.shape)}: a block holds 1 to {MAX_TOKENS} tokens, a batch at least one block")
        dtype_name(x.dtype)
        x = x.to(lay.dtype)
        if not is_finite(x):
            raise InvalidInputError(f"{what} hold NaN or Inf (in {dtype_name(lay.dtype)}); such a block is never stored")
        return x if x.ndim == 5 else x[None]

    @staticmethod
    def _starts(start: int | Sequence[int], count: int) -> list[int]:
        many = isinstance(start, (Sequence, np.ndarray, torch.Tensor)) and np.ndim(start) == 1
        try:
            starts = [index(s) for s in (start if many else [start])]
        except (TypeError, ValueError):
            starts = []
        if len(starts) != count or any(not 0 <= s < 1 << 32 for s in starts):
            raise InvalidInputError(f"start must be one position from 0 to 2³²-1 for each of the {count} blocks, not {start!r}")
        return starts

    def _tokens(self, tokens: Tokens | None, count: int, length: int) -> torch.Tensor | None:
        """Token ids as int64 [B, T] on their own device; None where the codec needs none."""
        if not self.needs_tokens:
            return None
        if tokens is None:
            raise InvalidInputError(f"codec {self.name!r} predicts from the block's token ids; give tokens=")
        try:
            ids = torch.as_tensor(tokens)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInputError(f"tokens must be {count} × {length} whole numbers: {error}") from error
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.numel() != count * length:
            raise InvalidInputError(f"tokens must be {count} × {length} whole numbers, not {list(ids.shape)} of {ids.dtype}")
        return ids.reshape(count, length).to(torch.int64)

    def _block(self, coded: Coded, start: int, length: int) -> EncodedBlock:
        lay = self.layout
        divergences = coded.divergences or (0.0,) * len(coded.layers)
        if not 1 <= len(coded.layers) <= MAX_FIDELITIES:
            raise ConfigError(f"codec {self.name!r} made {len(coded.layers)} layers; a block holds 1 to {MAX_FIDELITIES}")
        rows = tuple(
            LayerInfo(0, 0, Distortion(float(np.float32(d.keys)), float(np.float32(d.values))), float(np.float32(e)))
            for d, e in zip(coded.distortions, divergences, strict=True)
        )
        header = BlockHeader(
            self.wire_id, DTYPES[dtype_name(lay.dtype)][0], lay.layers, lay.kv_heads, lay.head_dim, start, length, rows,
            len(rows), profile=self.profile_digest,
        )  # fmt: skip
        return EncodedBlock.build(header, coded.layers, self.layer_major and len(coded.layers[0]) >= SECTIONED_FROM_BYTES)

    # ------------------------------------------------------------------------------------------------------------- decode

    @torch.no_grad()
    def decode(
        self,
        encoded: EncodedBlock | Sequence[EncodedBlock],
        *,
        tokens: Tokens | None = None,
        fidelity: int | None = None,
        out: tuple[torch.Tensor, torch.Tensor] | None = None,
        device: torch.device | str | None = None,
        on_layers: OnLayers | None = None,
        ready: OnLayers | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Decode one block, or a batch of blocks of the same length.

        Parameters
        ----------
        encoded : EncodedBlock or sequence of them
        tokens : int [T] or [B, T], optional
        fidelity : int, optional
            Layers of precision to use; None = all that are present (of each block).
        out : (keys, values), optional
            Tensors (or views) of the result's shape and the layout's dtype to write into, such as slices of a live cache. Their
            last dimension must be dense.
        device : optional
            Where the result is made when `out` is not given; the CPU by default.
        on_layers : callable, optional
            Told, in this thread, how many of the model's first layers are in `out` for good; the last time that it is all of them.
        ready : callable, optional
            Called, in this thread, before the payload of so many first layers is read; returns when it is there, or raises.

        Returns
        -------
        keys, values : Tensor [L, H, T, D], or [B, L, H, T, D] for a sequence; the layout's dtype, keys after RoPE.

        Raises
        ------
        CorruptBlockError
            For a payload that this codec cannot have written.
        LayoutMismatchError
            For a block of another layout, codec or profile.
        InvalidInputError
            For a fidelity that is not present, blocks of unequal length, missing tokens, or an `out` that does not fit.
        """
        single = isinstance(encoded, EncodedBlock)
        blocks = [encoded] if single else list(encoded or ())
        if not blocks or not all(isinstance(block, EncodedBlock) for block in blocks):
            raise InvalidInputError("there is no block to decode; read bytes with EncodedBlock.from_bytes")
        stored = [self._stored(block, fidelity) for block in blocks]
        length = stored[0].tokens
        if any(s.tokens != length for s in stored):
            raise InvalidInputError(f"blocks of one call must have the same length, not {sorted({s.tokens for s in stored})} tokens")
        ids = self._tokens(tokens, len(blocks), length)
        lay = self.layout
        shape = (len(blocks), lay.layers, lay.kv_heads, length, lay.head_dim)
        if out is None:
            k, v = (torch.empty(shape, dtype=lay.dtype, device=device) for _ in range(2))
            out = (k[0], v[0]) if single else (k, v)
        else:
            k, v = (self._checked_out(x, shape, single) for x in out)
        self._decode_when_ready(blocks, stored, ids, k, v, on_layers or (lambda layers: None), ready)
        return out

    def _stored(self, block: EncodedBlock, fidelity: int | None) -> Stored:
        head, lay = block.header, self.layout
        if head.codec != self.wire_id:
            raise LayoutMismatchError(f"the block was written by codec number {head.codec}; {self.name!r} is {self.wire_id}")
        ours = (DTYPES[dtype_name(lay.dtype)][0], lay.layers, lay.kv_heads, lay.head_dim)
        theirs = (head.dtype, head.layers, head.kv_heads, head.head_dim)
        if ours != theirs:
            raise LayoutMismatchError(f"the block's (dtype, layers, heads, head dim) {theirs} is not the layout's {ours}")
        if head.profile != self.profile_digest:
            theirs, ours = head.profile.hex()[:16], self.profile_digest.hex()[:16]
            raise LayoutMismatchError(f"the block was written with profile {theirs}…, this is {ours}…")
        use = head.present if fidelity is None else fidelity
        if not isinstance(use, int) or not 1 <= use <= head.present or use > len(block.payload):
            raise InvalidInputError(f"fidelity {fidelity} is not among those present (1 … {head.present})")
        layers = tuple(memoryview(p).cast("B") for p in block.payload[:use])
        sizes = self._layer_bytes(head.start, head.tokens)
        if sizes is not None and tuple(len(p) for p in layers) != sizes[:use]:
            found = [len(p) for p in layers]
            raise CorruptBlockError(f"the payload has {found} bytes; {head.tokens} tokens of {self.name!r} take {list(sizes)}")
        return Stored(head.start, head.tokens, layers)

    def _checked_out(self, x: torch.Tensor, shape: tuple[int, ...], single: bool) -> torch.Tensor:
        if not isinstance(x, torch.Tensor):
            raise InvalidInputError(f"out must be two tensors, not {type(x).__name__}")
        x = x[None] if single and x.ndim == 4 else x
        if tuple(x.shape) != shape or x.dtype != self.layout.dtype or x.stride(-1) != 1:
            raise InvalidInputError(
                f"out must be {list(shape[1:] if single else shape)} of {dtype_name(self.layout.dtype)}, dense in its last dimension, "
                f"not {list(x.shape)} of {x.dtype}"
            )
        return x

    def with_config(self, **options: Any) -> Codec:
        """This codec with some options changed."""
        return type(self)(self.layout, self.profile, replace(self.config, **options))


def is_finite(x: torch.Tensor) -> bool:
    """Whether no value is NaN or Inf, in one pass without a temporary of its size."""
    return bool(all_finite(x))


def all_finite(x: torch.Tensor) -> torch.Tensor:
    """`is_finite` as a bool [] on the device of `x`."""
    low, high = x.aminmax()
    return torch.isfinite(low) & torch.isfinite(high)


def relative_error(x_B: torch.Tensor, decoded_B: torch.Tensor) -> list[float]:
    """Sum of squared errors over sum of squares of each block [B, …]; 0 for a block of zeros that is decoded as zeros."""
    x, y = x_B.flatten(1).float(), decoded_B.flatten(1).float()
    pairs = torch.stack(((x - y).square().sum(1), x.square().sum(1)), 1).tolist()
    return [relative(error, energy) for error, energy in pairs]


def relative(error: float, energy: float) -> float:
    """`error` / `energy`; 0 where there was nothing to lose, 1 where squares overflow float32."""
    if not math.isfinite(error) or not math.isfinite(energy):
        return 1.0
    return error / energy if energy > 0 else float(error > 0)
