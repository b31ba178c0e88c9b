"""Windows of text to evaluate on: what the prefix and its continuation are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kvstore.errors import ConfigError
from services.calibrate import texts

from .model import CachedModel

#: Characters read for each token wanted; code and tables have fewer a token than this.
_CHARS_A_TOKEN = 8


@dataclass(frozen=True)
class Window:
    """A run of tokens of one document."""

    name: str
    ids: tuple[int, ...]


def collect(model: CachedModel, paths: Sequence[str], tokens: int, most: int) -> list[Window]:
    """Windows of `tokens` tokens, spread evenly over the documents and within each.

    Parameters
    ----------
    paths : sequence of str
        Files or directories; empty for text that every Python has.
    most : int
        How many windows at most.

    Raises
    ------
    ConfigError
        For a missing path, or when no document is long enough.
    """
    documents = _given(paths) if paths else [(f"python {n}", max(d, key=len)) for n, (_, d) in enumerate(texts.everywhere())]
    documents = documents[:most]
    each = -(-most // max(len(documents), 1))
    windows = []
    for name, text in documents:
        room = max(0, len(text) - tokens * _CHARS_A_TOKEN)
        for i in range(each):
            at = text.find("\n", int(room * (i + 0.5) / each)) + 1 if room else 0
            ids = model.ids(text[at : at + tokens * _CHARS_A_TOKEN])[:tokens]
            if len(ids) == tokens and (room or i == 0):
                windows.append(Window(name, tuple(ids)))
    if not windows:
        raise ConfigError(f"no text holds {tokens} tokens; give longer texts, or a shorter --prefix")
    return windows[:most]


def _given(paths: Sequence[str]) -> list[tuple[str, str]]:
    files = [file for path in map(Path, paths) for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    return [(file.name, texts.read([str(file)])[0]) for file in files if not file.is_dir()]
