"""The default: evict or demote what loses the least expected value, learnt online from the traffic itself.

Value of a step = Gittins index of the block's reuse class at its age (`reuse`) x loss per byte of its next step (`ladder`). The class is
what can be seen of a block: how often it was used, and of the request that used it last the pace of its conversation, the length of the
prompt, and how much of that was new. A partial tail is a class of its own: the next turn rewrites it. Blocks that left are remembered for
a while (`ghosts`), so that the learning also sees what came back too late.
"""

from __future__ import annotations

import math
from array import array
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from .base import BlockId, BlockInfo, EvictionPolicy, Request, Victim
from .candidates import DEPTH_SCALE, Candidates
from .classes import (
    COUNTED_ALIKE,
    FAN,
    FAN_AT,
    KEPT,
    NEW_AT,
    NEW_TOKENS,
    OF_USES,
    PACE_AT,
    PARTIAL,
    PARTIAL_ONCE,
    SIZE_AT,
    TRAITS,
    USED_AGAIN,
    USES_AT,
    WEIGHTS,
    situation,
    size_of,
)
from .ghosts import Ghosts
from .ladder import Step, StepTable
from .reuse import EDGES_S, ReuseModel
from .rival import ACCOUNT_BYTES, Rival, parse_account
from .table import NONE, BlockTable
from .trial import Trial

#: The first rounds of learning come sooner: after so many requests, then each time there are a quarter more.
_FIRST_ROUND = 10
#: A group of candidates is named by class, ladder and rung, the lowest bits of its key.
_RUNG_BITS = 8


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
        self.model = ReuseModel(TRAITS, memory=self.config.memory)
        self.model.values[PARTIAL] = array("f", [value * 1e-3 for value in self.model.values[PARTIAL]])
        self._used_at = array("d")
        self._state = array("I")
        self._ghosts = Ghosts(self.config.ghosts_per_block)
        self._candidates = Candidates(partial(_curve, self.model, self.table.steps), self._used_at, self.table.depth)
        self.rival = Rival()
        self._trial: Trial | None = None
        self._requests = self._touched = self._all_requests = 0
        self._seq: int | None = None
        self._base: int | None = None  # class of the request under way for blocks used once
        self._pace_now = self._new_now = 0
        self._guessed = False  # whether the new length of that request is its conversation's last
        self._now = 0.0
        self._forgotten = (0, 0.0, 0)  # class and size, time of the last use, and number of a run of ghosts that are not yet counted
        self._victim = NONE  # the slot last named

    def access(self, request: Request, blocks: Sequence[BlockInfo]) -> None:
        self._count_forgotten()
        begins = request.seq != self._seq
        if begins:  # what follows of the same request was used at the same time: else its beginning, being older, would seem to leave first
            self._now = max(request.now, self._now)
            self._seq, self._base = request.seq, None
            self._requests += 1
            self._all_requests += 1
        if not blocks:
            return
        if self._trial is not None:
            self.rival.lend(self._trial.access(request, blocks, self.table.size))
            self._trial = self._trial if self.rival.lends else None
        now = self._now
        self.rival.fit(round(self.table.size))
        slots, known = self._enter(blocks, now, begins)
        self.rival.came(now, len(blocks), blocks[-1].depth + 1)
        new_tokens = math.ceil(request.input_tokens * (len(blocks) - known) / (blocks[-1].depth + 1))
        # A request may come in parts. Where one begins with new blocks, the block before them may be new itself: only their length is news.
        if known or self._base is None:
            before = slots[known - 1] if known else self.table.parent[slots[0]]
            self._pace_now, self._new_now, self._base = self._situation(before, request.input_tokens, new_tokens, now)
            self._guessed = not new_tokens
        elif self._guessed:
            new = bisect_right(NEW_TOKENS, new_tokens)
            self._base, self._new_now, self._guessed = self._base + new - self._new_now, new, False
        self._classify(blocks, slots, known, now)
        self._touched += len(blocks)
        if self._is_round_due():
            self._learn(now)

    def victim(self, now: float) -> Victim | None:
        if self._trial is None and self.rival.lends:
            self._trial = Trial(self)
        self._candidates.kept_from = self.rival.edge if self.rival.leads else math.inf
        found = self._candidates.cheapest(now if now > self._now else self._now)
        if found is None:
            return None
        value, slot, step = found
        self._victim = slot
        return Victim(self.table.ids[slot], step.rung, value)

    def worth(self, request: Request, block: BlockInfo) -> float:
        if self.rival.leads:
            return math.inf  # recency holds whatever is used now
        ghost = self._ghosts.find(block.id)
        count = 1 if ghost is None else (ghost[0] >> USES_AT & 0xF) + 1
        parent = NONE if block.parent is None else self.table.find(block.parent)
        base = self._base if request.seq == self._seq else None
        if base is None:
            _, _, base = self._situation(parent, request.input_tokens, 0, max(request.now, self._now))
        deep = DEPTH_SCALE / (DEPTH_SCALE + block.depth)
        scale = self.table.steps.first(block.sizes, block.losses).loss * deep
        if count == 1 and block.partial:
            return self.model.values[PARTIAL][0] * scale
        # A block that came back carries the new ones behind it, and is worth as much as they are.
        return max(self.model.values[base + OF_USES[count]][0], self.model.values[base][0]) * scale

    def census(self, now: float) -> tuple[np.ndarray, np.ndarray]:
        slots = self.table.resident_slots()
        age_s = np.maximum(max(now, self._now) - np.array(self._used_at)[slots], 0.0)
        cls = np.array(self._state)[slots] & 0xFF
        values = np.array(self.model.values)[cls, np.searchsorted(EDGES_S, age_s, side="right") - 1]
        return self.table.census(values, slots)

    def lessons(self) -> bytes:
        return self.model.lessons() + self.rival.account()

    def heed(self, lessons: Sequence[bytes]) -> None:
        accounts = [parse_account(lesson[-ACCOUNT_BYTES:]) for lesson in lessons]
        self.model.heed([lesson[:-ACCOUNT_BYTES] for lesson in lessons])
        self.rival.heed(accounts)
        if self._trial is not None:
            self._trial.learnt.heed(lessons)

    def removed(self, id: BlockId) -> None:
        slot = self._find(id)
        if slot < 0:
            return
        forgotten = self._ghosts.remember(id, self._state[slot], self._used_at[slot], self.table.count)
        if forgotten is not None:
            self._forget(*forgotten)
        if self.rival.gone(self._used_at[slot]):
            self._candidates.stale()
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
            self.table.move(slot, rung)
            self._offer(slot)

    def promoted(self, id: BlockId) -> None:
        self.demoted(id, 0)

    def hold(self, id: BlockId) -> None:
        if self._trial is not None:
            self._trial.learnt.hold(id)
        self.table.hold(id)
        slot = self.table.find(id)
        if slot >= 0:
            self._candidates.remove(slot)

    def release(self, id: BlockId) -> None:
        if self._trial is not None:
            self._trial.learnt.release(id)
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
        rival, hits, rival_hits = self.rival, 0, 0
        cutoff, edge, spare = rival.cutoff, rival.edge, rival.spare
        last, last_state, run = now, 0, 0  # time, and class and size, of a run of blocks, which is counted at once
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
                self.rival.left(ghost[1], 0, 1)
            before, state = used_at[slot], states[slot]
            held = before >= cutoff or (before >= edge and block.depth < spare)
            rival_hits = (rival_hits or index + 1) if held else 0
            if before != last or (state ^ last_state) & 0xFF:
                self._count(last_state, last, run, now)
                last, last_state, run = before, state, 0
            run += 1
            slots[index] = slot
            known = known or index + 1
        self._count(last_state, last, run, now)
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

    def _count(self, state: int, before: float, blocks: int, now: float) -> None:
        """So many blocks of one class that were last used at one time, by a prompt of one size, are used now."""
        if blocks:
            self.model.used(state & 0xFF, now - before if before < now else 0.0, blocks * WEIGHTS[state >> SIZE_AT])
            self.rival.left(before, blocks)

    def _forget(self, state: int, time: float) -> None:
        """Note that a ghost was forgotten. Those of blocks that left in a row are forgotten in a row, and are counted at once."""
        last_state, last, run = self._forgotten
        if time != last or (state ^ last_state) & COUNTED_ALIKE:
            self._count_forgotten()
            run = 0
        self._forgotten = state, time, run + 1

    def _count_forgotten(self) -> None:
        """Count the run of ghosts that was forgotten last; done before time goes on, and before the model learns."""
        state, time, blocks = self._forgotten
        if blocks:
            weight = blocks * WEIGHTS[state >> SIZE_AT]
            self.model.forgot(state & 0xFF, self._now - time if time < self._now else 0.0, weight)
            self.rival.left(time, blocks, blocks)
            self._forgotten = state, time, 0

    def _situation(self, before: int, input_tokens: int, new_tokens: int, now: float) -> tuple[int, int, int]:
        """As `situation`, from the slot of the last block before the request's new ones, -1 for none."""
        if before < 0 or not self.table.resident[before]:
            return situation(None, 0.0, input_tokens, new_tokens)
        return situation(self._state[before], now - self._used_at[before], input_tokens, new_tokens)

    def _classify(self, blocks: Sequence[BlockInfo], slots: list[int], known: int, now: float) -> None:
        """Count the use of the request's blocks, set their classes, and list those whose next step may be taken.

        Of those after the first `known`, pace and new length are the request's, and their parents have one child more.
        """
        table, states, used_at, base, candidates = self.table, self._state, self._used_at, self._base, self._candidates
        parents, children, shapes, rungs = table.parent, table.children, table.shape, table.rung
        steps, holds = table.steps.rows, table.holds
        size = size_of(blocks[-1].depth + 1) << SIZE_AT
        said = self._pace_now << PACE_AT | self._new_now << NEW_AT | size
        last_key, run = NONE, []
        for index in range(len(slots) - 1, -1, -1):
            slot = slots[index]
            state = states[slot]
            uses = state >> USES_AT & 0xF
            counted = USED_AGAIN[uses] + base if uses or not blocks[index].partial else PARTIAL_ONCE
            if index >= known:
                parent = parents[slot]
                if parent >= 0 and states[parent] & FAN != FAN:
                    states[parent] += 1 << FAN_AT
                states[slot] = state & FAN | said | counted
            else:
                states[slot] = state & KEPT | size | counted
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
        if self._candidates.listed[slot] is not None or table.is_held(slot):
            return
        shape, rung = table.shape[slot], table.rung[slot]
        if not table.children[slot] or table.steps.rows[shape][rung].rung is not None:
            self._candidates.add(((self._state[slot] & 0xFF) << 8 | shape) << _RUNG_BITS | rung, (slot,))

    def _is_round_due(self) -> bool:
        requests = min(self.config.learn_requests, max(_FIRST_ROUND, self._all_requests // 4))
        return self._requests >= requests and self._touched >= 8 * _FIRST_ROUND

    def _learn(self, now: float) -> None:
        self.model.learn(self._waiting(now), self._requests)
        self._requests = self._touched = 0
        self._candidates.stale()

    def _waiting(self, now: float) -> np.ndarray:
        """Known blocks by class and age bucket, ghosts too; estimated from a sample where there are many."""
        shape = (len(TRAITS), len(EDGES_S))
        waiting = np.zeros(shape[0] * shape[1])
        slots = self.table.resident_slots()
        resident = np.array(self._state)[slots], np.array(self._used_at)[slots], len(self.table)
        parts = (resident, (*self._ghosts.arrays(), self._ghosts.count))
        for state, used_at, count in parts:
            if count:
                age = np.searchsorted(EDGES_S, np.maximum(now - used_at, 0.0), side="right") - 1
                weights = np.array(WEIGHTS)[state >> SIZE_AT] * (count / len(state))
                waiting += np.bincount((state & 0xFF).astype(np.int64) * shape[1] + age, weights, minlength=len(waiting))
        return waiting.reshape(shape)


def _curve(model: ReuseModel, steps: StepTable, key: int) -> tuple[Sequence[float], Step]:
    """What `Candidates` asks for: values by age bucket of the blocks with this key, and their next step."""
    rung, shape = key & (1 << _RUNG_BITS) - 1, key >> _RUNG_BITS & 0xFF
    return model.values[key >> _RUNG_BITS + 8], steps.rows[shape][rung]
