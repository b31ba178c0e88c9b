"""The default: evict or demote what loses the least expected value, learnt online from the traffic itself.

Value of a step = Gittins index of the block's reuse class at its age (`reuse`) x loss per byte of its next step (`ladder`). The class is
what can be seen of a block: how often it was used, the turn of the conversation that used it last, the pauses before the last turns, the
length of the prompt. A partial tail is a class of its own: the next turn rewrites it. Blocks that left are remembered for a while
(`ghosts`), so that the learning also sees what came back too late.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .base import BlockId, BlockInfo, EvictionPolicy, Request, Victim
from .candidates import Candidates
from .ghosts import Ghosts
from .reuse import EDGES_S, ReuseModel
from .rival import Rival
from .table import NONE, BlockTable

#: Bounds between classes. Seconds that a conversation pauses between turns: a program, one who watches it, one who reads, one who left.
_PAUSES_S = (15.0, 30.0, 60.0)
#: Weight of the newest pause in a conversation's pace, the moving mean of their logarithms.
_NEWEST = 0.3
_LENGTHS_TOKENS = (2048, 8192)
_TURNS, _USES = (3, 6), (2, 3, 5)
#: Turns and pauses: the first turn has no pause.
_SITUATIONS = 1 + (len(_TURNS) + 1) * (len(_PAUSES_S) + 1)
_WIDTH = _SITUATIONS * (len(_LENGTHS_TOKENS) + 1)
_PARTIAL = (len(_USES) + 1) * _WIDTH
#: Group of like classes, by class: how often used, and the partial tails.
_GROUPS = [cls // _WIDTH for cls in range(_PARTIAL)] + [len(_USES) + 1]
#: First class of a block's number of uses.
_OF_USES = [_WIDTH * bisect_right(_USES, uses) for uses in range(256)]
#: The first rounds of learning come sooner: after so many requests, then each time there are a quarter more.
_FIRST_ROUND = 10
#: A block that ever had this many children is a shared root: what follows it is a new conversation.
_SHARED_CHILDREN = 4
_RUNGS = 16
#: Of blocks alike in class and age the deeper is worth less, by half at this depth: over many nodes a chain is then given up from its tail.
_DEPTH_SCALE = 3000.0


def _pace_of(pause_s: float) -> int:
    """A pause on a logarithmic scale of one byte, 8 steps for each doubling; 0 stands for none."""
    return min(max(round(8 * math.log2(max(pause_s, 0.5))) + 9, 1), 255)


_PACES = tuple(map(_pace_of, _PAUSES_S))


class ValuePolicy(EvictionPolicy):
    """Learns the value of every class and age; takes the cheapest step of all."""

    name: ClassVar[str] = "value"

    @dataclass(frozen=True, slots=True)
    class Config:
        """
        Parameters
        ----------
        learn_requests : int
            Requests between two rounds of learning, fewer at the start.
        ghosts_per_block : float
            Blocks remembered after they left, for each resident block.
        memory : float
            Share of what was learnt that survives a round of learning.
        """

        learn_requests: int = 100
        ghosts_per_block: float = 4.0
        memory: float = 1.0

    def __init__(self, config: Config | None = None) -> None:
        super().__init__(config)
        self.table = BlockTable()
        self.model = ReuseModel(_GROUPS, memory=self.config.memory)
        self.model.values[_PARTIAL] = array("f", [value * 1e-3 for value in self.model.values[_PARTIAL]])
        self._used_at = array("d")
        self._class = bytearray()
        self._uses = bytearray()
        self._turn = bytearray()
        self._fan = bytearray()
        self._pace = bytearray()
        self._ghosts = Ghosts(self.config.ghosts_per_block)
        self._candidates = Candidates(self._price, self._used_at)
        self._rival = Rival()
        self._requests = self._touched = self._all_requests = 0
        self._seq: int | None = None
        self._base: int | None = None  # class of the request under way for blocks used once
        self._turn_now, self._pace_now = 1, 0
        self._now = 0.0
        self._victim = NONE  # the slot last named

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        self._now = now = max(request.now, self._now)
        begins = request.seq != self._seq
        if begins:
            self._seq, self._base = request.seq, None
            self._requests += 1
            self._all_requests += 1
        if not blocks:
            return
        room = len(self.table)
        slots, known = self._enter(blocks, now, begins)
        self._rival.came(now, len(blocks), room)
        # A request may come in parts. Where one begins with new blocks, the block before them may be new itself: all is said already.
        if known or self._base is None:
            before = slots[known - 1] if known else self.table.parent[slots[0]]
            self._turn_now, self._pace_now, self._base = self._situation(before, request.input_tokens, now)
        self._mark_new(slots, known)
        self._classify(blocks, slots, self._base, now)
        self._touched += len(blocks)
        if self._is_round_due():
            self._learn(now)

    def victim(self, now: float) -> Victim | None:
        found = self._candidates.cheapest(max(now, self._now))
        if found is None:
            return None
        value, self._victim = found
        return Victim(self.table.ids[self._victim], self.table.step(self._victim).rung, value)

    def worth(self, request: Request, block: BlockInfo) -> float:
        ghost = self._ghosts.find(block.id)
        count = 1 if ghost is None else (ghost[0] >> 8 & 0xF) + 1
        parent = NONE if block.parent is None else self.table.find(block.parent)
        base = self._base if request.seq == self._seq else None
        if base is None:
            _, _, base = self._situation(parent, request.input_tokens, max(request.now, self._now))
        deep = _DEPTH_SCALE / (_DEPTH_SCALE + block.depth)
        scale = self.table.steps.first(block.sizes, block.losses).loss * deep
        if count == 1 and block.partial:
            return self.model.values[_PARTIAL][0] * scale
        # A block that came back carries the new ones behind it, and is worth as much as they are.
        return max(self.model.values[base + _OF_USES[count]][0], self.model.values[base][0]) * scale

    def census(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        slots = self.table.resident_slots()
        age_s = np.maximum(max(now, self._now) - np.array(self._used_at)[slots], 0.0)
        cls = np.frombuffer(bytes(self._class), dtype=np.uint8)[slots]
        values = np.array(self.model.values)[cls, np.searchsorted(EDGES_S, age_s, side="right") - 1]
        return self.table.census(values, slots)

    def lessons(self) -> bytes:
        return self.model.lessons()

    def heed(self, lessons: Sequence[bytes]) -> None:
        self.model.heed(lessons)

    def removed(self, id: BlockId) -> None:
        slot = self._find(id)
        if slot < 0:
            return
        self._candidates.remove(self._key(slot), slot)
        uses, turn, fan = min(self._uses[slot], 15), min(self._turn[slot], 15), min(self._fan[slot], 15)
        state = self._class[slot] | uses << 8 | turn << 12 | fan << 16 | self._pace[slot] << 20
        forgotten = self._ghosts.remember(id, state, self._used_at[slot], len(self.table))
        if forgotten is not None:
            self.model.forgot(forgotten[0] & 0xFF, max(self._now - forgotten[1], 0.0))
            self._rival.left(forgotten[1], 1)
        parent = self.table.remove(slot)
        if parent >= 0:
            self._offer(parent)

    def demoted(self, id: BlockId, rung: int) -> None:
        slot = self._find(id)
        if slot >= 0:
            self._candidates.remove(self._key(slot), slot)
            self.table.rung[slot] = rung
            self._offer(slot)

    def promoted(self, id: BlockId) -> None:
        self.demoted(id, 0)

    def hold(self, id: BlockId) -> None:
        self.table.hold(id)
        slot = self.table.find(id)
        if slot >= 0:
            self._candidates.remove(self._key(slot), slot)

    def release(self, id: BlockId) -> None:
        if self.table.release(id):
            slot = self.table.find(id)
            if slot >= 0:
                self._offer(slot)

    def _find(self, id: BlockId) -> int:
        """`table.find`, quickly for the last victim."""
        slot, table = self._victim, self.table
        return slot if slot >= 0 and table.ids[slot] == id and table.resident[slot] else table.find(id)

    def _enter(self, blocks: Sequence[BlockInfo], now: float, begins: bool) -> tuple[list[int], int]:
        """Make all blocks resident and count uses; whether a request `begins` with them.

        Answers their slots, and how many from the root on were known before.
        """
        table, used_at, classes, candidates = self.table, self._used_at, self._class, self._candidates
        slots, known = [0] * len(blocks), 0
        rival, hits, rival_hits = self._rival, 0, 0
        cutoff, edge, spare = rival.cutoff, rival.edge, rival.spare
        last, run = (0, now), 0  # class and time of a run of blocks, which is counted at once
        for index in range(len(blocks) - 1, -1, -1):  # children first, so that what has one is no candidate
            block = blocks[index]
            slot = table.find(block.id)
            fresh = slot < 0
            if fresh:
                slot = table.add(block)
                if table.slots > len(classes):
                    self._reserve()
                self._retract(table.parent[slot])
                ghost = self._ghosts.take(block.id)
                if ghost is None:
                    self._uses[slot] = self._turn[slot] = self._fan[slot] = self._pace[slot] = 0
                    slots[index] = slot
                    known = hits = rival_hits = 0
                    continue
                kept, used_at[slot] = ghost
                classes[slot], self._uses[slot] = kept & 0xFF, kept >> 8 & 0xF
                self._turn[slot], self._fan[slot], self._pace[slot] = kept >> 12 & 0xF, kept >> 16 & 0xF, kept >> 20
                hits = 0
            else:
                hits = hits or index + 1
                if slot in candidates:
                    candidates.remove(self._key(slot), slot)
            before = used_at[slot]
            held = before >= cutoff or (before >= edge and index < spare)
            rival_hits = (rival_hits or index + 1) if held else 0
            if (state := (classes[slot], before)) != last:
                self._count(last, run, now)
                last, run = state, 0
            run += 1
            slots[index] = slot
            known = known or index + 1
        self._count(last, run, now)
        if rival.judge(len(blocks), hits, rival_hits, begins):
            candidates.stale()
        return slots, known

    def _count(self, state: tuple[int, float], blocks: int, now: float) -> None:
        """So many blocks of one class that were last used at one time are used now."""
        if blocks:
            cls, before = state
            self.model.used(cls, max(now - before, 0.0), blocks)
            self._rival.left(before, blocks)

    def _reserve(self) -> None:
        missing = self.table.slots - len(self._class)
        self._used_at.extend([0.0] * missing)
        for column in (self._class, self._uses, self._turn, self._fan, self._pace):
            column.extend(bytes(missing))
        self._candidates.reserve(self.table.slots)

    def _situation(self, before: int, input_tokens: int, now: float) -> tuple[int, int, int]:
        """Turn, pace and class of a request, from the slot of the last block before its new ones, -1 for none."""
        length = bisect_right(_LENGTHS_TOKENS, input_tokens)
        if before < 0 or not self.table.resident[before] or self._fan[before] >= _SHARED_CHILDREN:
            return 1, 0, length
        turn = min(self._turn[before] + 1, 255)
        newest, pace = _pace_of(now - self._used_at[before]), self._pace[before]
        pace = round(pace + _NEWEST * (newest - pace)) if pace else newest
        situation = 1 + bisect_right(_TURNS, turn) * (len(_PAUSES_S) + 1) + bisect_right(_PACES, pace)
        return turn, pace, situation * (len(_LENGTHS_TOKENS) + 1) + length

    def _mark_new(self, slots: list[int], known: int) -> None:
        for slot in slots[known:]:
            self._turn[slot], self._pace[slot] = self._turn_now, self._pace_now
            parent = self.table.parent[slot]
            if parent >= 0 and self._fan[parent] < 255:
                self._fan[parent] += 1

    def _classify(self, blocks: Sequence[BlockInfo], slots: list[int], base: int, now: float) -> None:
        uses, classes, used_at = self._uses, self._class, self._used_at
        for index in range(len(slots) - 1, -1, -1):
            slot = slots[index]
            count = uses[slot] + 1
            uses[slot] = count = count if count < 255 else 255
            classes[slot] = _PARTIAL if count == 1 and blocks[index].partial else base + _OF_USES[count]
            used_at[slot] = now
            self._offer(slot)

    def _offer(self, slot: int) -> None:
        """List the block as a candidate if its next step may be taken."""
        table, shape, rung = self.table, self.table.shape[slot], self.table.rung[slot]
        if slot in self._candidates or table.is_held(slot):
            return
        if not table.children[slot] or table.steps.rows[shape][rung].rung is not None:
            self._candidates.add((self._class[slot] << 8 | shape) * _RUNGS + rung, slot)

    def _retract(self, parent: int) -> None:
        """The block in slot `parent` (or -1) got a child: it may no longer be dropped."""
        if parent >= 0 and self.table.resident[parent] and self.table.step(parent).rung is None:
            self._candidates.remove(self._key(parent), parent)

    def _key(self, slot: int) -> int:
        return (self._class[slot] << 8 | self.table.shape[slot]) * _RUNGS + self.table.rung[slot]

    def _price(self, slot: int, now: float) -> float:
        table, age_s = self.table, max(now - self._used_at[slot], 0.0)
        if self._rival.leads:
            return table.steps.rows[table.shape[slot]][table.rung[slot]].loss / (age_s + 1.0)
        index = self.model.values[self._class[slot]][bisect_right(EDGES_S, age_s) - 1]
        return index * table.steps.rows[table.shape[slot]][table.rung[slot]].loss * _DEPTH_SCALE / (_DEPTH_SCALE + table.depth[slot])

    def _is_round_due(self) -> bool:
        requests = min(self.config.learn_requests, max(_FIRST_ROUND, self._all_requests // 4))
        return self._requests >= requests and self._touched >= 8 * _FIRST_ROUND

    def _learn(self, now: float) -> None:
        self.model.learn(self._waiting(now), self._requests)
        self._requests = self._touched = 0
        self._candidates.stale()

    def _waiting(self, now: float) -> np.ndarray:
        """Known blocks by class and age bucket, ghosts too; estimated from a sample where there are many."""
        shape = (len(_GROUPS), len(EDGES_S))
        waiting = np.zeros(shape[0] * shape[1])
        slots = self.table.resident_slots()
        classes = np.frombuffer(bytes(self._class), dtype=np.uint8)[slots]
        state, time = self._ghosts.arrays()
        parts = ((classes, np.array(self._used_at)[slots], len(self.table)), (state & 0xFF, time, self._ghosts.count))
        for cls, used_at, count in parts:
            if count:
                age = np.searchsorted(EDGES_S, np.maximum(now - used_at, 0.0), side="right") - 1
                waiting += np.bincount(cls.astype(np.int64) * shape[1] + age, minlength=len(waiting)) * (count / len(cls))
        return waiting.reshape(shape)
