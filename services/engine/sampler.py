"""Choose the next token from logits; the same seed gives the same draw in any batch."""

from __future__ import annotations

import hashlib
import struct

import torch

from .base import SamplingParams


class Sampler:
    """The choices of one request.

    The draw for a place in the sequence is a function of the seed and that place alone (a counter-based generator). So it depends
    neither on other requests nor on how often the request was interrupted, and an answer that is resumed by a new request, whose
    prompt holds the tokens that came, goes on with the draws that it would have had.

    Parameters
    ----------
    params : SamplingParams
    seed : int
        `params.seed`, or one drawn by the caller where that is None.
    """

    def __init__(self, params: SamplingParams, seed: int) -> None:
        self.params, self.seed = params, seed

    def choose(self, logits: torch.Tensor, place: int, best: int | None = None) -> int:
        """The token at `place` of the sequence, prompt included.

        Parameters
        ----------
        logits : Tensor [vocabulary], float32
        best : int, optional
            What `likeliest` gives for these logits, where it was asked for many rows at once.
        """
        p = self.params
        if p.temperature == 0:
            return int(logits.argmax()) if best is None else best
        probabilities, tokens = torch.softmax(logits.double() / p.temperature, -1).sort(descending=True, stable=True)
        if p.top_k:
            probabilities, tokens = probabilities[: p.top_k], tokens[: p.top_k]
        cumulative = probabilities.cumsum(-1)
        if p.top_p < 1:
            # The token that crosses top_p is the last one kept, so at least one always is.
            cumulative = cumulative[: int((cumulative < p.top_p * cumulative[-1]).sum()) + 1]
        at = torch.searchsorted(cumulative, uniform(self.seed, place) * cumulative[-1], right=True)
        return int(tokens[min(int(at), len(cumulative) - 1)])


def likeliest(logits: torch.Tensor) -> list[int]:
    """The token with the highest of `logits` [rows, vocabulary], in each row; the device is waited for once."""
    return logits.argmax(-1).tolist()


def uniform(seed: int, step: int) -> float:
    """Number `step` of the stream of `seed`, in [0, 1), with 53 random bits."""
    word = hashlib.blake2b(struct.pack("<QQ", seed & (1 << 64) - 1, step), digest_size=8).digest()
    return (int.from_bytes(word, "little") >> 11) / (1 << 53)
