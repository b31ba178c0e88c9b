"""The scenes of the demo, in their order. Each does one thing on the real system and says what came of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from kvstore.settings import format_size

from .client import Answer, Client
from .documents import document, question
from .store import NodeState, Store

LONG_TOKENS, SHORT_TOKENS = 1500, 300
#: Most documents that the eviction scene asks about before it gives up.
MAX_DOCUMENTS = 16


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table. `good` says whether what was promised came true."""

    scene: str
    outcome: str
    good: bool
    answer: Answer | None = None


@dataclass(slots=True)
class Story:
    """What the scenes share.

    Parameters
    ----------
    first, second : Client
        Two worker processes on the same nodes; the second stores `raw`.
    store : Store
    say : callable
        Takes a line that announces the next scene.
    """

    first: Client
    second: Client
    store: Store
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)
    #: The exact prompt's answer without the store.
    alone: tuple[int, ...] = ()

    def run(self) -> Iterator[Row]:
        """Play all scenes; gives each row as it comes."""
        for scene in (self._cold_and_warm, self._second_worker, self._raw_is_exact, self._eviction, self._killed_node):
            for row in scene():
                self.rows.append(row)
                yield row

    def _cold_and_warm(self) -> Iterator[Row]:
        text = document(0, LONG_TOKENS)
        self.say("A long document is asked about for the first time: the model must read all of it.")
        cold = self.first.ask(question(text, "What is this text about?"))
        yield Row("asked cold", f"{cold.prompt_tokens} tokens computed", cold.cached_tokens == 0, cold)
        self.store.settled()
        self.say("The same document, another question: its keys and values come compressed from the store nodes.")
        warm = self.first.ask(question(text, "Which words are explained?"))
        quicker = cold.ttft_ms / max(warm.ttft_ms, 1e-3)
        yield Row("asked warm", f"first token {quicker:.1f} times sooner", warm.cached_tokens > 0 and quicker > 1, warm)

    def _second_worker(self) -> Iterator[Row]:
        self.say("A second worker process, which never saw the document, is asked: all it knows of it comes from the store.")
        answer = self.second.ask(question(document(0, LONG_TOKENS), "Who would read this?"))
        outcome = f"{answer.cached_tokens} of {answer.prompt_tokens} tokens from the store"
        yield Row("second worker", outcome, answer.cached_tokens > 0, answer)

    def _raw_is_exact(self) -> Iterator[Row]:
        self.say("With the codec raw, an answer from the store must be the answer without it, token for token.")
        prompt = self._exact_prompt()
        self.second.ask(prompt)
        self.store.settled()
        alone, stored = self.second.ask(prompt, bypass=True), self.second.ask(prompt)
        same, self.alone = alone.tokens == stored.tokens, alone.tokens
        outcome = f"{len(stored.tokens)} tokens, {'all the same' if same else 'not the same'} as without the store"
        yield Row("raw, exact", outcome, same and stored.cached_tokens > 0, stored)

    def _eviction(self) -> Iterator[Row]:
        nodes = self.store.nodes()
        room = sum(node.arena_bytes for node in nodes)
        self.say(f"More documents than fit into {format_size(room)}: the nodes evict, and stay within their memory.")
        asked, highest = 0, [0] * len(nodes)
        while asked < MAX_DOCUMENTS and not all(node.evictions for node in nodes):
            asked += 1
            self.first.ask(question(document(asked, LONG_TOKENS), "What is this text about?"))
            nodes = self.store.settled()
            highest = [max(high, node.used_bytes) for high, node in zip(highest, nodes, strict=True)]
        within = all(high <= node.arena_bytes for high, node in zip(highest, nodes, strict=True))
        outcome = f"{asked} documents; " + "; ".join(_account(node, high) for node, high in zip(nodes, highest, strict=True))
        yield Row("eviction", outcome, within and all(node.evictions for node in nodes))

    def _killed_node(self) -> Iterator[Row]:
        self.say("The store node that served last is killed with SIGKILL; the next answer must still come, and be right.")
        prompt = self._exact_prompt()
        self.second.ask(prompt)
        self.store.settled()
        self.second.ask(prompt)
        victim = self.store.last_used()
        os.kill(victim.pid, signal.SIGKILL)
        after = self.second.ask(prompt)
        same = after.tokens == self.alone
        outcome = f"{victim.id}, which held some of it, is gone; the answer is {'the same' if same else 'not the same'}"
        yield Row("node killed", outcome, same, after)

    @staticmethod
    def _exact_prompt() -> str:
        return question(document(MAX_DOCUMENTS + 1, SHORT_TOKENS), "What is this text about?")


def _account(node: NodeState, highest: int) -> str:
    return f"{node.id} dropped {node.evictions} blocks, at most {format_size(highest)} of {format_size(node.arena_bytes)}"
