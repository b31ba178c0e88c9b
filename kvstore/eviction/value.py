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
from .candidates import DEPTH_SCALE, Candidates
from .ghosts import Ghosts
from .ladder import Step
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
#: What is known of a block is one word, the state of its ghost too: its class in the low byte, then how often it was used, its turn, and
#: its children so far, each in 4 bits and up to 15, then its pace.
_USES_AT, _TURN_AT, _FAN_AT, _PACE_AT = 8, 12, 16, 20
_FAN = 0xF << _FAN_AT
_KEPT = ~((1 << _TURN_AT) - 1)  # all but class and uses
#: Group of like classes, by class: how often used, and the partial tails.
_GROUPS = [cls // _WIDTH for cls in range(_PARTIAL)] + [len(_USES) + 1]
#: First class of a block's number of uses.
_OF_USES = [_WIDTH * bisect_right(_USES, uses) for uses in range(17)]
#: By the number of uses before: class and uses in the word of a block that is used again, less the class of one used once.
_USED_AGAIN = [_OF_USES[uses] | uses << _USES_AT for uses in (*range(1, 16), 15)]
#: The first rounds of learning come sooner: after so many requests, then each time there are a quarter more.
_FIRST_ROUND = 10
#: A block that ever had this many children is a shared root: what follows it is a new conversation.
_SHARED_CHILDREN = 4
#: Class and uses in the word of a partial tail that was used once.
_PARTIAL_ONCE = _PARTIAL | 1 << _USES_AT
#: A group of candidates is named by class, ladder and rung, the lowest bits of its key.
_RUNG_BITS = 8


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
        self._state = array("I")
        self._ghosts = Ghosts(self.config.ghosts_per_block)
        self._candidates = Candidates(self._curve, self._used_at, self.table.depth)
        self._rival = Rival()
        self._requests = self._touched = self._all_requests = 0
        self._seq: int | None = None
        self._base: int | None = None  # class of the request under way for blocks used once
        self._turn_now, self._pace_now = 1, 0
        self._now = 0.0
        self._forgotten = (0, 0.0, 0)  # class, time of the last use, and number of a run of ghosts that are not yet counted
        self._victim = NONE  # the slot last named

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        self._count_forgotten()
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
        self._classify(blocks, slots, known, now)
        self._touched += len(blocks)
        if self._is_round_due():
            self._learn(now)

    def victim(self, now: float) -> Victim | None:
        found = self._candidates.cheapest(now if now > self._now else self._now)
        if found is None:
            return None
        value, slot, step = found
        self._victim = slot
        return Victim(self.table.ids[slot], step.rung, value)

    def worth(self, request: Request, block: BlockInfo) -> float:
        ghost = self._ghosts.find(block.id)
        count = 1 if ghost is None else (ghost[0] >> _USES_AT & 0xF) + 1
        parent = NONE if block.parent is None else self.table.find(block.parent)
        base = self._base if request.seq == self._seq else None
        if base is None:
            _, _, base = self._situation(parent, request.input_tokens, max(request.now, self._now))
        deep = DEPTH_SCALE / (DEPTH_SCALE + block.depth)
        scale = self.table.steps.first(block.sizes, block.losses).loss * deep
        if count == 1 and block.partial:
            return self.model.values[_PARTIAL][0] * scale
        # A block that came back carries the new ones behind it, and is worth as much as they are.
        return max(self.model.values[base + _OF_USES[count]][0], self.model.values[base][0]) * scale

    def census(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        slots = self.table.resident_slots()
        age_s = np.maximum(max(now, self._now) - np.array(self._used_at)[slots], 0.0)
        cls = np.array(self._state)[slots] & 0xFF
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
        forgotten = self._ghosts.remember(id, self._state[slot], self._used_at[slot], self.table.count)
        if forgotten is not None:
            self._forget(forgotten[0] & 0xFF, forgotten[1])
        parent = self.table.remove(slot)
        if parent >= 0 and self._is_alike(slot, parent):
            self._candidates.replace(slot, parent)
        else:
            self._candidates.remove(slot)
            if parent >= 0:
                self._offer(parent)

    def demoted(self, id: BlockId, rung: int) -> None:
        slot = self._find(id)
        if slot >= 0:
            self._candidates.remove(slot)
            self.table.rung[slot] = rung
            self._offer(slot)

    def promoted(self, id: BlockId) -> None:
        self.demoted(id, 0)

    def hold(self, id: BlockId) -> None:
        self.table.hold(id)
        slot = self.table.find(id)
        if slot >= 0:
            self._candidates.remove(slot)

    def release(self, id: BlockId) -> None:
        if self.table.release(id):
            slot = self.table.find(id)
            if slot >= 0:
                self._offer(slot)

    def _find(self, id: BlockId) -> int:
        """`table.find`, quickly for the last victim."""
        slot, table = self._victim, self.table
        return slot if slot >= 0 and table.ids[slot] == id and table.resident[slot] else table.find(id)

    def _is_alike(self, slot: int, parent: int) -> bool:
        """Whether a leaf, which is not held, is to stand among the candidates just where its last child in `slot` did."""
        table, states, used_at, listed = self.table, self._state, self._used_at, self._candidates.listed
        return (
            listed[parent] is None
            and listed[slot] is not None
            and used_at[parent] == used_at[slot]
            and not (states[parent] ^ states[slot]) & 0xFF
            and table.shape[parent] == table.shape[slot]
            and table.rung[parent] == table.rung[slot]
            and not table.is_held(parent)
        )

    def _enter(self, blocks: Sequence[BlockInfo], now: float, begins: bool) -> tuple[list[int], int]:
        """Make all blocks resident and count uses; whether a request `begins` with them.

        Answers their slots, and how many from the root on were known before.
        """
        self._reserve(len(blocks))
        table, used_at, states, candidates = self.table, self._used_at, self._state, self._candidates
        ids, parents, resident, listed = table.ids, table.parent, table.resident, candidates.listed
        slots, known, slot = [0] * len(blocks), 0, NONE
        rival, hits, rival_hits = self._rival, 0, 0
        cutoff, edge, spare = rival.cutoff, rival.edge, rival.spare
        last, last_class, run = now, 0, 0  # time and class of a run of blocks, which is counted at once
        for index in range(len(blocks) - 1, -1, -1):  # children first, so that what has one is no candidate
            block = blocks[index]
            slot = parents[slot] if slot >= 0 else NONE  # of the block after this one: most often it is this one
            if slot < 0 or ids[slot] != block.id:
                slot = table.locate(block.id)
            if slot >= 0 and resident[slot]:
                hits = hits or index + 1
                if listed[slot] is not None:
                    candidates.remove(slot)
            else:
                hits, slot = 0, self._insert(block, slot)
                ghost = self._ghosts.take(block.id)
                if ghost is None:
                    states[slot] = known = rival_hits = 0
                    slots[index] = slot
                    continue
                states[slot], used_at[slot] = ghost
            before, cls = used_at[slot], states[slot] & 0xFF
            held = before >= cutoff or (before >= edge and index < spare)
            rival_hits = (rival_hits or index + 1) if held else 0
            if before != last or cls != last_class:
                self._count(last_class, last, run, now)
                last, last_class, run = before, cls, 0
            run += 1
            slots[index] = slot
            known = known or index + 1
        self._count(last_class, last, run, now)
        if rival.judge(len(blocks), hits, rival_hits, begins):
            candidates.stale()
        return slots, known

    def _insert(self, block: BlockInfo, slot: int) -> int:
        """Make a block resident, from its `BlockTable.locate`; its slot. Its parent may no longer be dropped."""
        table, listed = self.table, self._candidates.listed
        slot = table.add(block, slot)
        parent = table.parent[slot]
        if parent >= 0 and listed[parent] is not None and table.step(parent).rung is None:
            self._candidates.remove(parent)
        return slot

    def _reserve(self, blocks: int) -> None:
        """Make room for the slots of `blocks` new blocks and place holders for their parents."""
        slots = self.table.slots + 2 * blocks
        missing = slots - len(self._state)
        if missing > 0:
            self._used_at.extend([0.0] * missing)
            self._state.extend([0] * missing)
            self._candidates.reserve(slots)

    def _count(self, cls: int, before: float, blocks: int, now: float) -> None:
        """So many blocks of one class that were last used at one time are used now."""
        if blocks:
            self.model.used(cls, now - before if before < now else 0.0, blocks)
            self._rival.left(before, blocks)

    def _forget(self, cls: int, time: float) -> None:
        """Note that a ghost was forgotten. Those of blocks that left in a row are forgotten in a row, and are counted at once."""
        last_cls, last, run = self._forgotten
        if time != last or cls != last_cls:
            self._count_forgotten()
            run = 0
        self._forgotten = cls, time, run + 1

    def _count_forgotten(self) -> None:
        """Count the run of ghosts that was forgotten last; done before time goes on, and before the model learns."""
        cls, time, blocks = self._forgotten
        if blocks:
            self.model.forgot(cls, self._now - time if time < self._now else 0.0, blocks)
            self._rival.left(time, blocks)
            self._forgotten = cls, time, 0

    def _situation(self, before: int, input_tokens: int, now: float) -> tuple[int, int, int]:
        """Turn, pace and class of a request, from the slot of the last block before its new ones, -1 for none."""
        length = bisect_right(_LENGTHS_TOKENS, input_tokens)
        if before < 0 or not self.table.resident[before]:
            return 1, 0, length
        state = self._state[before]
        if state >> _FAN_AT & 0xF >= _SHARED_CHILDREN:
            return 1, 0, length
        turn = min((state >> _TURN_AT & 0xF) + 1, 15)
        newest, pace = _pace_of(now - self._used_at[before]), state >> _PACE_AT
        pace = round(pace + _NEWEST * (newest - pace)) if pace else newest
        situation = 1 + bisect_right(_TURNS, turn) * (len(_PAUSES_S) + 1) + bisect_right(_PACES, pace)
        return turn, pace, situation * (len(_LENGTHS_TOKENS) + 1) + length

    def _classify(self, blocks: Sequence[BlockInfo], slots: list[int], known: int, now: float) -> None:
        """Count the use of the request's blocks, set their classes, and list those whose next step may be taken.

        Of those after the first `known`, turn and pace are the request's, and their parents have one child more.
        """
        table, states, used_at, base, candidates = self.table, self._state, self._used_at, self._base, self._candidates
        parents, children, shapes, rungs = table.parent, table.children, table.shape, table.rung
        steps, holds = table.steps.rows, table.holds
        said = self._turn_now << _TURN_AT | self._pace_now << _PACE_AT
        last_key, run = NONE, []
        for index in range(len(slots) - 1, -1, -1):
            slot = slots[index]
            state = states[slot]
            uses = state >> _USES_AT & 0xF
            counted = _USED_AGAIN[uses] + base if uses or not blocks[index].partial else _PARTIAL_ONCE
            if index >= known:
                parent = parents[slot]
                if parent >= 0 and states[parent] & _FAN != _FAN:
                    states[parent] += 1 << _FAN_AT
                states[slot] = state & _FAN | said | counted
            else:
                states[slot] = state & _KEPT | counted
            used_at[slot] = now
            shape, rung = shapes[slot], rungs[slot]
            if (children[slot] and steps[shape][rung].rung is None) or (holds and table.ids[slot] in holds):
                continue
            key = ((counted & 0xFF) << 8 | shape) << _RUNG_BITS | rung
            if key != last_key and run:
                candidates.add(last_key, run)
                run = []
            last_key = key
            run.append(slot)
        if run:
            candidates.add(last_key, run)

    def _offer(self, slot: int) -> None:
        """List the block as a candidate if its next step may be taken."""
        table = self.table
        if self._candidates.listed[slot] is not None or (table.holds and table.ids[slot] in table.holds):
            return
        shape, rung = table.shape[slot], table.rung[slot]
        if not table.children[slot] or table.steps.rows[shape][rung].rung is not None:
            self._candidates.add(((self._state[slot] & 0xFF) << 8 | shape) << _RUNG_BITS | rung, (slot,))

    def _curve(self, key: int) -> tuple[Sequence[float], Step]:
        """What `Candidates` asks for: values by age bucket of the blocks with this key, empty while recency leads, and their next step."""
        rung, shape = key & (1 << _RUNG_BITS) - 1, key >> _RUNG_BITS & 0xFF
        values = () if self._rival.leads else self.model.values[key >> _RUNG_BITS + 8]
        return values, self.table.steps.rows[shape][rung]

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
        classes = np.array(self._state)[slots] & 0xFF
        state, time = self._ghosts.arrays()
        parts = ((classes, np.array(self._used_at)[slots], len(self.table)), (state & 0xFF, time, self._ghosts.count))
        for cls, used_at, count in parts:
            if count:
                age = np.searchsorted(EDGES_S, np.maximum(now - used_at, 0.0), side="right") - 1
                waiting += np.bincount(cls.astype(np.int64) * shape[1] + age, minlength=len(waiting)) * (count / len(cls))
        return waiting.reshape(shape)
