"""Which blocks are resident, and which of them are leaves: the bookkeeping that all policies share.

Blocks live in *slots* of flat arrays, found by the hash of their id through chains in two more arrays: about 40 bytes a block, where
a dict of objects takes 300. A slot whose block is not resident but is the parent of resident ones is kept as a place
holder, so that blocks may come and go in any order (their parents may live on other nodes).
"""

from __future__ import annotations

from array import array

import numpy as np

from .base import BlockId, BlockInfo
from .ladder import Step, StepTable

NONE = -1


class BlockTable:
    """Slots of resident blocks. Public arrays are read by slot; only `add`, `remove` and `move` change them.

    Attributes
    ----------
    parent : array of int32
        Slot of the parent, -1 at a root.
    children : list of int
        Resident children.
    depth : list of int
    rung, shape : bytearray
        Where the block stands on its ladder, and which ladder (`StepTable`).
    resident : bytearray
        1 where the slot holds a resident block.
    size : float
        Resident blocks, each counted by the share of its full size that is held.
    holds : dict
        Holds by id, of blocks that are held, resident or not.
    ids : list
        Id by slot, a place holder's too; None in a free slot.
    """

    def __init__(self) -> None:
        self.parent = array("i")
        self.children: list[int] = []
        self.depth: list[int] = []
        self.rung = bytearray()
        self.shape = bytearray()
        self.ids: list[BlockId | None] = []
        self.steps = StepTable()
        self.count = 0
        self.size = 0.0
        self.resident = bytearray()
        self._next = array("i")
        self._heads = array("i", [NONE]) * 64
        self._free = array("i")
        self.holds: dict[BlockId, int] = {}

    def __len__(self) -> int:
        """Resident blocks."""
        return self.count

    @property
    def slots(self) -> int:
        """Slots ever made; arrays of a policy's own must be this long."""
        return len(self.ids)

    def find(self, id: BlockId) -> int:
        """Slot of a resident block, -1 if it is not resident."""
        slot = self.locate(id)
        return slot if slot >= 0 and self.resident[slot] else NONE

    def locate(self, id: BlockId) -> int:
        """Slot of a block or of a place holder for it, -1 if there is neither."""
        ids, following = self.ids, self._next
        slot = self._heads[hash(id) & (len(self._heads) - 1)]
        while slot >= 0 and ids[slot] != id:
            slot = following[slot]
        return slot

    def add(self, block: BlockInfo, slot: int | None = None) -> int:
        """Make a block that is not resident resident at rung 0; its slot. Left out, `slot` is what `locate` answers for it."""
        shape, parent = self.steps.number(block.sizes, block.losses), NONE
        if slot is None:
            slot = self.locate(block.id)
        if slot < 0:
            slot = self._allocate(block.id)
        if block.parent is not None:
            parent = self.locate(block.parent)
            if parent < 0:
                parent = self._allocate(block.parent)
            self.children[parent] += 1
        self.resident[slot] = 1
        self.parent[slot] = parent
        self.depth[slot] = block.depth
        self.rung[slot] = 0
        self.shape[slot] = shape
        self.count += 1
        self.size += 1.0
        return slot

    def remove(self, slot: int) -> int:
        """The block left. Answers the slot of its parent if that became a leaf by it, else -1."""
        parent, children = self.parent[slot], self.children
        self.resident[slot] = 0
        self.count -= 1
        self.size -= self.step(slot).share
        if not children[slot]:
            self._discard(slot)
        if parent < 0:
            return NONE
        children[parent] = others = children[parent] - 1
        if others:
            return NONE
        if self.resident[parent]:
            return parent
        self._discard(parent)
        return NONE

    def move(self, slot: int, rung: int) -> None:
        """A resident block was demoted, or promoted, to `rung`."""
        self.size -= self.step(slot).share
        self.rung[slot] = rung
        self.size += self.step(slot).share

    def is_leaf(self, slot: int) -> bool:
        """Whether the slot holds a resident block that has no resident child."""
        return bool(self.resident[slot]) and not self.children[slot]

    def is_resident(self, slot: int) -> bool:
        """Whether the slot holds a resident block."""
        return bool(self.resident[slot])

    def step(self, slot: int) -> Step:
        """The cheapest next step down of a resident block."""
        return self.steps.rows[self.shape[slot]][self.rung[slot]]

    def census(self, reuse: np.ndarray, slots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Value per byte of the next step and share of the full size, for resident `slots` with `reuse` uses a second."""
        rows = self.steps.rows
        width = max((len(row) for row in rows), default=1)
        loss, share = np.zeros((len(rows) + 1, width)), np.zeros((len(rows) + 1, width))
        for number, row in enumerate(rows):
            loss[number, : len(row)] = [step.loss for step in row]
            share[number, : len(row)] = [step.share for step in row]
        shape, rung = np.array(self.shape)[slots], np.array(self.rung)[slots]
        return reuse * loss[shape, rung], share[shape, rung]

    def resident_slots(self, limit: int = 20_000) -> np.ndarray:
        """Slots of all resident blocks, or of an even sample when there are more than `limit`."""
        slots = np.flatnonzero(np.frombuffer(bytes(self.resident), dtype=np.uint8))
        return slots[:: 1 + len(slots) // limit]

    def hold(self, id: BlockId) -> None:
        """Count one more hold of `id`, resident or not."""
        self.holds[id] = self.holds.get(id, 0) + 1

    def release(self, id: BlockId) -> bool:
        """Undo one hold; True when it was the last one."""
        left = self.holds.get(id, 0) - 1
        if left > 0:
            self.holds[id] = left
            return False
        return self.holds.pop(id, None) is not None

    def is_held(self, slot: int) -> bool:
        """Whether the block in the slot is held."""
        return bool(self.holds) and self.ids[slot] in self.holds

    def _allocate(self, id: BlockId) -> int:
        if self._free:
            slot = self._free.pop()
            self.ids[slot] = id
        else:
            slot = len(self.ids)
            self.ids.append(id)
            for column in (self.parent, self._next):
                column.append(NONE)
            for column in (self.children, self.depth, self.rung, self.shape, self.resident):
                column.append(0)
            if slot >= len(self._heads):
                self._grow()
        heads = self._heads
        head = hash(id) & (len(heads) - 1)
        self._next[slot], heads[head] = heads[head], slot
        return slot

    def _discard(self, slot: int) -> None:
        heads, following = self._heads, self._next
        head = hash(self.ids[slot]) & (len(heads) - 1)
        at = heads[head]
        if at == slot:
            heads[head] = following[slot]
        else:
            while following[at] != slot:
                at = following[at]
            following[at] = following[slot]
        self.ids[slot] = None
        self._free.append(slot)

    def _grow(self) -> None:
        """Double the chains' heads. Runs only when no slot is free: every slot but the newest is in a chain."""
        self._heads = heads = array("i", [NONE]) * (2 * len(self._heads))
        for slot in range(len(self.ids) - 1):
            head = hash(self.ids[slot]) & (len(heads) - 1)
            self._next[slot], heads[head] = heads[head], slot
