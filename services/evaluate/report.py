"""One evaluation from model to result, and the table and plot of several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.codecs import Codec, Profile, create
from kvstore.errors import ConfigError
from services.plot import line_plot

from . import divergence, tasks, windows
from .model import CachedModel

#: What ``--compare`` runs: codec, its options, tokens a block (None: what was asked for).
COMPARED: tuple[tuple[str, dict[str, float], int | None], ...] = (
    ("raw", {}, None),
    ("int8", {}, None),
    ("fp8", {}, None),
    ("int4", {}, None),
    ("int2", {}, None),
    ("svd", {"ratio": 4.0}, 256),
    ("svd", {"ratio": 8.0}, 256),
    ("svd", {"ratio": 16.0}, 256),
    ("transform", {"ratio": 8.0}, None),
    ("transform", {"ratio": 16.0}, None),
    ("transform", {"ratio": 32.0}, None),
)
#: And what is left of blocks of the finest of those when their upper layers of precision are dropped: divergence alone.
TRUNCATED = ("transform", {"ratio": 8.0}, (1, 2))
Report = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to evaluate on.

    Parameters
    ----------
    texts : sequence of str
        Files or directories; empty for text that every Python has.
    prefix_tokens, continued_tokens : int
        What is compressed, and what is said on top of it.
    most_windows : int
    questions : bool
        Whether to run recall, pass key and the five rounds too.
    """

    texts: Sequence[str] = ()
    prefix_tokens: int = 1024
    continued_tokens: int = 256
    most_windows: int = 6
    questions: bool = True


class Evaluation:
    """The reference run of a plan, against which any number of codecs is measured."""

    def __init__(self, model: CachedModel, plan: Plan, report: Report = lambda what, done, total: None) -> None:
        if plan.prefix_tokens < 8 or plan.continued_tokens < 8:
            raise ConfigError("--prefix and --continue take at least 8 tokens each")
        self.model, self.plan, self.report = model, plan, report
        found = windows.collect(self.model, plan.texts, plan.prefix_tokens + plan.continued_tokens, plan.most_windows)
        self.prepared = divergence.prepare(self.model, found, plan.prefix_tokens, lambda d, t: report("reading", d, t))
        self.questions: dict[str, tasks.Accuracy] = {}
        if plan.questions:
            straw = [token for item in self.prepared for token in item.window.ids]
            sets = {"recall": tasks.recall(self.model), "pass_key": tasks.pass_key(self.model, straw)}
            self.questions = {k: tasks.Accuracy(self.model, v, lambda d, t: report("asking", d, t)) for k, v in sets.items()}

    def codec(self, name: str, profile: Profile | None, options: dict[str, Any]) -> Codec:
        """The codec for this model's cache in float32."""
        return create(name, self.model.layout, profile, **options)

    def measure(self, codec: Codec, block_tokens: int, fidelity: int | None = None) -> dict[str, Any]:
        """All figures of one codec, ready for JSON."""
        result: dict[str, Any] = {
            "codec": codec.name,
            "options": vars(codec.config),
            "block_tokens": block_tokens,
            "fidelity": fidelity,
            "windows": len(self.prepared),
            "prefix_tokens": self.plan.prefix_tokens,
            "continued_tokens": self.plan.continued_tokens,
            "profile_bytes": codec.profile.size_bytes if codec.profile is not None else 0,
            **divergence.measure(self.model, codec, self.prepared, block_tokens, fidelity),
        }
        if fidelity is None:
            result |= {name: questions.measure(codec, block_tokens) for name, questions in self.questions.items()}
            if self.plan.questions:
                result["rounds"] = divergence.rounds(self.model, codec, self.prepared[0], block_tokens)
        return result

    def compare(self, profile: Profile, block_tokens: int) -> list[dict[str, Any]]:
        """All of `COMPARED`, and `TRUNCATED`."""
        runs = [(name, options, tokens or block_tokens, None) for name, options, tokens in COMPARED]
        runs += [(*TRUNCATED[:2], block_tokens, fidelity) for fidelity in TRUNCATED[2]]
        out = []
        for number, (name, options, tokens, fidelity) in enumerate(runs):
            self.report("codecs", number, len(runs))
            out.append(self.measure(self.codec(name, profile, options), tokens, fidelity))
        return out


def table(results: Sequence[dict[str, Any]]) -> str:
    """Results for people, one line each."""
    head = f"{'codec':<12}{'block':>6}{'ratio':>8}{'KL mean':>10}{'KL p99':>9}{'top-1':>7}{'perplexity':>22}{'K err':>9}{'V err':>9}"
    asked = "recall" in results[0]
    lines = [head + (f"{'recall':>8}{'pass key':>9}{'5th round':>10}" if asked else "")]
    for r in results:
        low, high = r["perplexity_factor_95"]
        perplexity = f"×{r['perplexity_factor']:.4f} ({low:.3f}–{high:.3f})"
        line = (
            f"{_name(r):<12}{r['block_tokens']:>6}{r['ratio']:>8.2f}{r['kl_mean_nats']:>10.5f}{r['kl_p99_nats']:>9.4f}"
            f"{r['top1_agreement']:>7.3f}{perplexity:>22}{r['key_error']:>9.5f}{r['value_error']:>9.5f}"
        )
        if "recall" in r:
            line += f"{r['recall']['accuracy_compressed']:>8.3f}{r['pass_key']['accuracy_compressed']:>9.2f}"
            line += f"{r['rounds'][-1]['kl_mean_nats']:>10.5f}"
        lines.append(line)
    if any(r["fidelity"] for r in results):
        lines.append("a number after the name: truncated to that many layers of precision")
    lines.append(f"perplexity of the exact cache {results[0]['perplexity_exact']:.3f}; KL in nats a token, {results[0]['windows']} windows")
    if asked:
        exact = [results[0][task]["accuracy_exact"] for task in ("recall", "pass_key")]
        lines.append(f"with the exact cache: recall {exact[0]:.3f}, pass key {exact[1]:.2f}")
    return "\n".join(lines)


def _name(result: dict[str, Any]) -> str:
    return result["codec"] + (f", {result['fidelity']}" if result["fidelity"] else "")


def plot(results: Sequence[dict[str, Any]]) -> str:
    """Rate against divergence as SVG, a line a codec."""
    series: dict[str, list[tuple[float, float]]] = {}
    for r in results:
        if r["codec"] != "raw":
            name = r["codec"] + (", truncated" if r["fidelity"] else "")
            series.setdefault(name, []).append((r["ratio"], r["kl_mean_nats"]))
    return line_plot(
        {name: sorted(points) for name, points in series.items()},
        title="What compression costs: divergence against ratio",
        x_label="times smaller than 16 bits, all bytes counted",
        y_label="KL(exact ‖ compressed), nats a token",
        log_x=True,
        log_y=True,
    )
