"""The story on a terminal: a line before each scene, one table at the end."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from kvstore.settings import format_size

from .story import Row


def table(rows: list[Row]) -> Table:
    """All scenes; what they measured, and whether the promise was kept."""
    made = Table(title="What happened", title_justify="left", show_lines=False)
    for name in ("", "scene", "first token", "from store", "fetched", "ratio", "outcome"):
        made.add_column(name, justify="right" if name in ("first token", "from store", "fetched", "ratio") else "left")
    for row in rows:
        made.add_row("✓" if row.good else "✗", row.scene, *_figures(row), row.outcome)
    return made


def tell(console: Console, rows: list[Row], seconds: float) -> None:
    """The table and, last, how to call it oneself."""
    console.print()
    console.print(table(rows))
    failed = [row.scene for row in rows if not row.good]
    broken = f" Not kept: {', '.join(failed)}." if failed else ""
    console.print(f"{len(rows) - len(failed)} of {len(rows)} promises kept in {seconds:.0f} s.{broken}")
    console.print('Now you:  make up  &&  .venv/bin/concertina generate "Once upon a time" --stream  (and  make down)', highlight=False)


def as_json(rows: list[Row]) -> list[dict]:
    """The rows as plain objects; None where a scene has no single answer."""
    return [
        {
            "scene": row.scene,
            "good": row.good,
            "outcome": row.outcome,
            "ttft_ms": row.answer and row.answer.ttft_ms,
            "prompt_tokens": row.answer and row.answer.prompt_tokens,
            "cached_tokens": row.answer and row.answer.cached_tokens,
            "bytes_fetched": row.answer and row.answer.bytes_fetched,
            "ratio": row.answer and row.answer.ratio,
        }
        for row in rows
    ]


def _figures(row: Row) -> list[str]:
    answer = row.answer
    if answer is None:
        return ["", "", "", ""]
    fetched = format_size(answer.bytes_fetched) if answer.bytes_fetched else "–"
    ratio = f"{answer.ratio:.1f}×" if answer.ratio else "–"
    return [f"{answer.ttft_ms:.0f} ms", f"{answer.cached_tokens} tokens" if answer.cached_tokens else "–", fetched, ratio]
