"""Turn tokens into text piece by piece: no half characters, and no text that a stop string may yet claim."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

#: What tokenizers put where bytes are no whole character yet.
REPLACEMENT = "\ufffd"


class Decoder(Protocol):
    """The part of a tokenizer that is needed here."""

    def decode(self, token_ids: list[int], skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """The text of one answer as it grows.

    Tokens are decoded together with a few before them, because a token's text may depend on its neighbours (joined spaces, characters
    of several bytes); the difference to the text of those before alone is new. After Text Generation Inference's
    `decode_token` with its two offsets.

    Parameters
    ----------
    tokenizer : Decoder
    stop : sequence of str
        The text ends before the first occurrence of any of these.
    """

    def __init__(self, tokenizer: Decoder, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._tokens: list[int] = []
        self._before = self._read = 0
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Text that has become certain with `token`. Sets `stopped` when a stop string is complete."""
        self._tokens.append(token)
        old = self._decode(self._before, self._read)
        new = self._decode(self._before, len(self._tokens))
        if len(new) <= len(old) or new.endswith(REPLACEMENT):
            return ""
        self._before, self._read = self._read, len(self._tokens)
        return self._release(new[len(old) :])

    def finish(self) -> str:
        """What is still held back, incomplete characters included; empty after a stop string."""
        if self.stopped:
            return ""
        tail = self._decode(self._before, len(self._tokens))[len(self._decode(self._before, self._read)) :]
        self._read = self._before = len(self._tokens)
        text = self._release(tail) + self._held
        self._held = ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._tokens[start:stop], skip_special_tokens=True)

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        found = [at for at in (text.find(s) for s in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = max((overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a proper beginning of `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
