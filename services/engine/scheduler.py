"""Which requests run in the next step. No tensors, no time, no threads: the same calls give the same plans.

Requests wait in order of arrival, enter while there are slots, have their prompts computed tile by tile and then take part in every
decode step. While anybody decodes, at most one prefill step comes between two decode steps of the plan; the model's thread decodes
within a long one as well (`next_decode`), so that a stream's gaps are those of a few decode steps. Streams give way a little longer to
prompts that are nearly done, since each of those is one more request that shares every decode step (`patience`).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field

#: Tiles that a prompt has left when it is nearly done.
SHORT = 2


@dataclass(slots=True)
class Entry:
    """One request: `computed` of its `prompt` tokens have K and V; it decodes once all have."""

    id: str
    prompt: int
    computed: int

    @property
    def decoding(self) -> bool:
        return self.computed >= self.prompt


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: spans (id, start, stop) of prompts, or the ids of requests that decode. Never both."""

    prefill: tuple[tuple[str, int, int], ...] = ()
    decode: tuple[str, ...] = ()


@dataclass(slots=True)
class Scheduler:
    """Bounded, first come first served.

    Parameters
    ----------
    slots : int
        Requests that run at once.
    tile : int
        Tokens of a tile of prompt.
    tiles : tuple of int
        How many tiles one prefill step may have; 1 among them.
    busy_tiles : int
        Most of them while somebody decodes.
    rows : int
        Requests of one decode step; more take turns.
    mixed : bool
        Whether partial tiles may share a step with others: where all steps have one number of rows.
    """

    slots: int
    tile: int
    tiles: tuple[int, ...]
    busy_tiles: int
    rows: int
    mixed: bool = False
    waiting: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    running: OrderedDict[str, Entry] = field(default_factory=OrderedDict)
    _prefilled: bool = False

    def add(self, entry: Entry) -> None:
        """Queue a request; the caller has bounded how many there are. At least its last prompt token must be uncomputed."""
        if entry.id in self.waiting or entry.id in self.running or entry.computed >= entry.prompt or entry.computed % self.tile:
            raise ValueError(f"{entry} cannot be queued: it must be new, end in uncomputed tokens and start at a tile")
        self.waiting[entry.id] = entry

    def remove(self, id_: str) -> None:
        """Forget a request, whatever its state; unknown ones are ignored."""
        self.waiting.pop(id_, None)
        self.running.pop(id_, None)

    def plan(self) -> Plan:
        """Admit who fits, and say what to run next. Empty when there is nothing to do."""
        while self.waiting and len(self.running) < self.slots:
            id_, entry = self.waiting.popitem(last=False)
            self.running[id_] = entry
        decode = any(e.decoding for e in self.running.values())
        prefill = [e for e in self.running.values() if not e.decoding]
        if prefill and not (decode and self._prefilled and self.patience() == 1):
            self._prefilled = True
            return Plan(prefill=self._spans(prefill, self.busy_tiles if decode else max(self.tiles)))
        self._prefilled = False
        return Plan(decode=self.next_decode())

    def patience(self) -> int:
        """How many times as long as usual streams may wait: as many as there are prompts that are nearly done; at least 1."""
        return max(1, sum(0 < e.prompt - e.computed <= SHORT * self.tile for e in self.running.values()))

    def next_decode(self) -> tuple[str, ...]:
        """Who decodes next; where they are too many for one step, they take turns."""
        decode = [e.id for e in self.running.values() if e.decoding]
        for id_ in decode[: self.rows] if len(decode) > self.rows else ():
            self.running.move_to_end(id_)
        return tuple(decode[: self.rows])

    def _spans(self, prefill: list[Entry], most: int) -> tuple[tuple[str, int, int], ...]:
        """The next tiles, first come first served: the largest allowed number of whole ones that there is work for, or one partial tile.

        Unless steps are `mixed`, a partial tile has as many rows as tokens. It is then alone in its step, so that the step's shape depends
        on its prompt and nothing else.
        """
        spans: list[tuple[str, int, int]] = []
        for entry in prefill:
            for start in range(entry.computed, entry.prompt, self.tile):
                span = (entry.id, start, min(start + self.tile, entry.prompt))
                partial = span[2] - start < self.tile and not self.mixed
                if partial and not spans:
                    return (span,)
                if partial or len(spans) == most:
                    return self._allowed(spans)
                spans.append(span)
        return self._allowed(spans)

    def _allowed(self, spans: list[tuple[str, int, int]]) -> tuple[tuple[str, int, int], ...]:
        return tuple(spans[: max(n for n in self.tiles if n <= len(spans))])

    def computed(self, id_: str, tokens: int) -> None:
        """All prompt tokens before `tokens` have K and V now."""
        self.running[id_].computed = tokens
