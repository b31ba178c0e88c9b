"""Can the model still find what the compressed cache holds? Questions that were not known when it was encoded."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvstore.codecs import Codec

from .model import CachedModel, through

_NOUNS = (
    "anchor", "barrel", "candle", "dragon", "elbow", "feather", "goblet", "hammock", "iceberg", "jewel", "kettle", "lantern",
    "magnet", "napkin", "orchid", "pillow", "quartz", "ribbon", "saddle", "teapot", "urchin", "velvet", "walnut", "yogurt",
    "zipper", "badger", "canoe", "dagger", "ember", "ferry", "glacier", "harbor", "insect", "jacket", "kayak", "ladder",
    "meadow", "noodle", "oyster", "puzzle", "raven", "sandal", "tunnel", "umbrella", "violet", "wagon", "yacht", "acorn",
    "beetle", "cactus", "dolphin", "emerald", "falcon", "guitar",
)  # fmt: skip
_WARM_UP = 10


@dataclass(frozen=True)
class Question:
    """A prefix to be cached, a continuation given token by token, and the spans of it that the model must have predicted."""

    prefix: tuple[int, ...]
    continuation: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


def recall(model: CachedModel, lists: int = 3, pairs: int = 40) -> list[Question]:
    """Associative recall: lines ``noun: number``, then the same lines in another order. The first ten of those are a warm-up."""
    out = []
    for seed in range(lists):
        rng = random.Random(seed)
        table = [(noun, f"{rng.randrange(1000, 10000)}") for noun in rng.sample(_NOUNS, pairs)]
        prefix = model.ids("".join(f"{noun}: {number}\n" for noun, number in table) + "\n")
        rng.shuffle(table)
        ids: list[int] = []
        spans = []
        for noun, number in table:
            ids += model.ids(f"{noun}:")
            answer = model.ids(f" {number}")
            spans.append((len(ids), len(ids) + len(answer)))
            ids += answer + model.ids("\n")
        out.append(Question(tuple(prefix), tuple(ids), tuple(spans[_WARM_UP:])))
    return out


def pass_key(model: CachedModel, haystack: Sequence[int], trials: int = 10, tokens: int = 500) -> list[Question]:
    """A five-digit key hidden in running text at depths spread evenly; asked for after the cached prefix.

    Parameters
    ----------
    haystack : sequence of int
        Token ids to hide it in.
    """
    out = []
    for trial in range(trials):
        rng = random.Random(1000 + trial)
        key = f"{rng.randrange(10000, 100000)}"
        at = rng.randrange(max(1, len(haystack) - tokens))
        straw = list(haystack[at : at + tokens])
        depth = len(straw) * (trial + 1) // (trials + 1)
        before, after = model.tokenizer.decode(straw[:depth]), model.tokenizer.decode(straw[depth:])
        needle = f"\n\nThe pass key is {key}. Keep it in mind: {key} is the pass key.\n\n"
        story = f"Somewhere in this text stands a pass key. Find it.\n\n{before}{needle}{after}"
        prefix, question = _asked(model, story, "What is the pass key?")
        lead, answer = model.ids(question + "The pass key is"), model.ids(f" {key}")
        out.append(Question(tuple(model.ids(prefix)), tuple(lead + answer), ((len(lead), len(lead) + len(answer)),)))
    return out


def _asked(model: CachedModel, story: str, question: str) -> tuple[str, str]:
    """The prompt split before the question, through the model's chat template where it has one."""
    if not model.tokenizer.chat_template:
        return f"{story}\n\n", f"{question}\n"
    marker = "\N{OBJECT REPLACEMENT CHARACTER}"
    message = [{"role": "user", "content": f"{story}\n\n{marker}{question}"}]
    prompt = model.tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    before, _, after = prompt.partition(marker)
    return before, after


class Accuracy:
    """Share of spans that greedy decoding gets wholly right, with the exact cache and with a codec's.

    The exact answers are computed once and kept.
    """

    def __init__(self, model: CachedModel, questions: Sequence[Question], report: Callable[[int, int], None]) -> None:
        self.model, self.questions, self.exact = model, questions, []
        self._caches = []
        for number, question in enumerate(questions):
            report(number, len(questions))
            _, cache = model.run(question.prefix, logits=False)
            self._caches.append(cache)
            self.exact += self._answers(question, cache)

    def _answers(self, question: Question, cache: Any) -> list[bool]:
        log_p, _ = self.model.run(question.continuation, cache)
        best = [-1, *log_p.argmax(-1).tolist()]
        return [best[a:b] == list(question.continuation[a:b]) for a, b in question.spans]

    def measure(self, codec: Codec, block_tokens: int) -> dict[str, float]:
        """Accuracy through `codec`, and the share of exactly answered spans that stayed right."""
        squeezed: list[bool] = []
        for question, cache in zip(self.questions, self._caches, strict=True):
            squeezed += self._answers(question, through(codec, cache, question.prefix, block_tokens)[0])
        right = sum(self.exact)
        return {
            "questions": len(squeezed),
            "accuracy_exact": right / len(squeezed),
            "accuracy_compressed": sum(squeezed) / len(squeezed),
            "kept": sum(a and b for a, b in zip(self.exact, squeezed, strict=True)) / max(right, 1),
        }
