"""Which tokens of a block are kept finer than others.

How much an error in a token's K and V harms what the model says later differs by orders of magnitude between tokens, and the sizes of
its K and V, head by head, tell much of it (large keys and small values mark what many later tokens attend to). Calibration fits the
logarithm of the harm to the logarithms of those sizes; the encoder puts each token of a block into a *class* by it, and a class has its
own quantizer step: harm times squared step stays the same, which is the best that a number of bits can do (reverse water-filling over
tokens). The classes are written into the block, 4 bits a token, so a decoder needs to know nothing of how they were chosen.

Within a block the tokens are coded class by class; the exact first token of a sequence stays in front.

Legend: B blocks, L model layers, K keys or values, H KV heads, T tokens, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from kvstore.errors import CorruptBlockError

from .models import OCTAVE

CLASSES = 16
#: The class that is coded with the block's own step; the next one is coded with a step `CLASS_STEPS` indices finer.
USUAL = 8
#: Two thirds of an octave of the step: a factor of 2.8 in harm. Finer classes gain 3 % and cost more streams than that.
CLASS_STEPS = 24
#: Bytes that a stream costs beyond its numbers, and the share of the base layer that classes may add of those.
_STREAM_BYTES, _STREAM_SHARE = 28, 0.04
_SMALLEST = 1e-20


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """The classes of one block's coded tokens, uint8 [T] in the order of the sequence."""

    of: np.ndarray

    @property
    def order(self) -> np.ndarray:
        """Where the tokens lie in the sequence, in the order in which they are coded: int64 [T]."""
        return np.argsort(self.of, kind="stable")

    @property
    def runs(self) -> list[tuple[int, int, int]]:
        """(offset of the step index, first token, one past the last) of each class that occurs, in the order of coding."""
        if not len(self.of):
            return [(0, 0, 0)]
        counts, end, out = np.bincount(self.of, minlength=CLASSES).tolist(), 0, []
        for number, count in enumerate(counts):
            end += count
            if count:
                out.append(((USUAL - number) * CLASS_STEPS, end - count, end))
        return out

    def to_bytes(self) -> bytes:
        """Two classes a byte, the earlier one in the low half."""
        padded = np.append(self.of, np.zeros(len(self.of) % 2, dtype=np.uint8))
        return (padded[0::2] | padded[1::2] << 4).astype(np.uint8).tobytes()

    @classmethod
    def from_bytes(cls, data: bytes, tokens: int) -> TokenClasses:
        """The inverse of `to_bytes`. Raises CorruptBlockError for bytes that it does not write."""
        packed = np.frombuffer(data, dtype=np.uint8)
        unpacked = np.stack([packed & 15, packed >> 4], 1).reshape(-1)
        if len(packed) != packed_bytes(tokens) or unpacked[tokens:].any():
            raise CorruptBlockError(f"the classes of {tokens} tokens are damaged")
        return cls(unpacked[:tokens])

    @classmethod
    def alike(cls, tokens: int) -> TokenClasses:
        """One class for all."""
        return cls(np.full(tokens, USUAL, dtype=np.uint8))

    @classmethod
    def by(cls, harm_T: np.ndarray, most: int) -> TokenClasses:
        """At most `most` classes by the logarithms (base 2) of the tokens' harms, the usual one at their mean."""
        finer = (harm_T - harm_T.mean()) * (OCTAVE / 2 / CLASS_STEPS) if len(harm_T) else harm_T
        for apart in (1, 2, 4):
            found = cls(np.clip(USUAL + apart * np.round(finer / apart), 0, CLASSES - 1).astype(np.uint8))
            if len(found.runs) <= most:
                return found
        return cls.alike(len(harm_T))


def packed_bytes(tokens: int) -> int:
    """Bytes of the classes of `tokens` tokens."""
    return (tokens + 1) // 2


def most_classes(base_bytes: float, groups: int) -> int:
    """How many classes a block whose base layer has `base_bytes` can afford, each with a stream of its own for every group."""
    return 1 + int(_STREAM_SHARE * base_bytes / (_STREAM_BYTES * groups))


def log_sizes(k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> torch.Tensor:
    """log2 of the mean square of each head's K and V: float64 [B, L, K, H, T]. RoPE does not change them."""
    sizes = [torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square() / x.shape[-1] for x in (k_BLHTD, v_BLHTD)]
    return torch.stack(sizes, 2).double().clamp_min(_SMALLEST).log2()


def harms(weights_LKH: torch.Tensor, k_BLHTD: torch.Tensor, v_BLHTD: torch.Tensor) -> np.ndarray:
    """log2 of the expected harm of each token, up to a constant: float64 [B, T]."""
    return (log_sizes(k_BLHTD, v_BLHTD) * weights_LKH.to(k_BLHTD.device)[None, ..., None]).sum((1, 2, 3)).cpu().numpy()


def arranged(x_BLHTD: torch.Tensor, orders_BT: torch.Tensor) -> torch.Tensor:
    """The tokens of each block in the order given."""
    return torch.stack([x.index_select(2, order) for x, order in zip(x_BLHTD, orders_BT.to(x_BLHTD.device), strict=True)])


def put_back(x_BLHTD: torch.Tensor, orders_BT: torch.Tensor) -> None:
    """Undo `arranged` in place, with room for one block."""
    for x, places in zip(x_BLHTD, orders_BT.argsort(1).to(x_BLHTD.device), strict=True):
        x.copy_(x.index_select(2, places))
