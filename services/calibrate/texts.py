"""Text to calibrate on: given files, or what every Python has.

The mix matters more than the amount: what remains of a codec's error sits in texts unlike those it was calibrated on. Without files it is
sources and docstrings of the standard library and of installed packages, the language reference, licences and changelogs. The stories,
letters, reports and conversations that no Python carries lie beside this file, in ``prose/``: short pieces, written for this purpose.
"""

from __future__ import annotations

import ast
import html
import random
import re
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from kvstore.errors import ConfigError

#: Characters taken for a window, for each token wanted: enough for dense code and plenty for prose.
CHARS_A_TOKEN = 7
#: Documents shorter than this are left out.
LEAST_CHARS = 300
PROSE = Path(__file__).parent / "prose"
#: Files larger than this are read in part.
MAX_FILE_BYTES = 64 << 20
_SKIP = {"test", "tests", "__pycache__", "node_modules", ".git", "site-packages", "idle_test", "lib2to3"}
_DOCUMENTED = ("torch", "transformers", "numpy", "ray", "numba", "huggingface_hub")

Tokenize = Callable[[str], list[int]]


def read(paths: Sequence[str]) -> list[str]:
    """Texts of the files given, directories searched throughout.

    Raises
    ------
    ConfigError
        For a path that is not there, or when nothing readable is found.
    """
    out = []
    for path in map(Path, paths):
        if not path.exists():
            raise ConfigError(f"--texts {path}: no such file or directory")
        files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
        for file in files:
            with file.open("rb") as f:
                data = f.read(MAX_FILE_BYTES)
            if b"\0" not in data[:4096] and data.strip():
                out.append(data.decode(errors="replace"))
    if not out:
        raise ConfigError(f"--texts {' '.join(paths)}: no text in there")
    return out


def everywhere() -> list[tuple[float, list[str]]]:
    """Text that is there on every machine: for each kind, its share of the mix and its documents."""
    lib = Path(sysconfig.get_path("stdlib"))
    packages = Path(sysconfig.get_path("purelib"))
    sources = _sources(lib, 4000)
    kinds: list[tuple[float, list[str]]] = [
        (0.3, sources),
        (0.25, [_language_reference()]),
        (0.2, [_docstrings(sources[::8]), *(_docstrings(_sources(packages / name, 20_000, 25)) for name in _DOCUMENTED)]),
        (0.15, [_text(p) for p in sorted(packages.glob("*.dist-info/METADATA")) if p.stat().st_size > 4000]),
        (0.25, [piece for file in sorted(PROSE.glob("*.txt")) for piece in _text(file).split("\n\n")]),
        (0.1, [_plain(_text(p)) for p in (lib / "idlelib/help.html", lib / "idlelib/NEWS.txt", lib / "LICENSE.txt") if p.exists()]),
    ]
    kinds = [(share, [d for d in documents if len(d) > LEAST_CHARS]) for share, documents in kinds]
    return [(share, documents) for share, documents in kinds if documents]


def windows(
    kinds: Sequence[tuple[float, Sequence[str]]], count: int, tokens: int, tokenize: Tokenize, seed: int = 0
) -> list[list[int]]:
    """Runs of exactly `tokens` token ids, drawn from kinds of documents by their shares; documents by the square root of their length.

    Raises
    ------
    ConfigError
        If the texts are too short for a single window.
    """
    rng = random.Random(seed)
    total = sum(share for share, _ in kinds)
    out: list[list[int]] = []
    for number, (share, documents) in enumerate(kinds):
        quota = round(count * sum(s for s, _ in kinds[: number + 1]) / total) - round(count * sum(s for s, _ in kinds[:number]) / total)
        weights = [len(d) ** 0.5 for d in documents]
        for _ in range(quota if share else 0):
            out.append(_window(documents, weights, tokens, tokenize, rng))
    out = [w for w in out if len(w) == tokens]
    if not out:
        raise ConfigError(f"the texts hold less than one window of {tokens} tokens; give more text")
    rng.shuffle(out)
    return out


def _window(documents: Sequence[str], weights: Sequence[float], tokens: int, tokenize: Tokenize, rng: random.Random) -> list[int]:
    """One window; documents that end early are followed by others."""
    ids: list[int] = []
    for _ in range(64):
        document = rng.choices(documents, weights)[0]
        length = tokens * CHARS_A_TOKEN
        at = rng.randrange(max(1, len(document) - length))
        at = document.find("\n", at) + 1 if at else 0
        ids += tokenize(document[at : at + length])
        if len(ids) >= tokens:
            break
    return ids[:tokens]


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _sources(folder: Path, least: int, most: int = 10_000) -> list[str]:
    files = (p for p in sorted(folder.rglob("*.py")) if not _SKIP & set(p.relative_to(folder).parts) and p.stat().st_size >= least)
    return [_text(p) for _, p in zip(range(most), files, strict=False)]


def _language_reference() -> str:
    import pydoc_data.topics

    return "\n\n".join(pydoc_data.topics.topics.values())


def _docstrings(sources: Iterable[str]) -> str:
    """Docstrings of several lines, indentation removed: technical prose."""
    out = []
    for source in sources:
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (doc := ast.get_docstring(node)) and len(doc) > 300:
                out.append(doc)
    return "\n\n".join(out)


def _plain(markup: str) -> str:
    return html.unescape(re.sub(r"<[^>]*>", "", markup))
