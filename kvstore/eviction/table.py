"""Which blocks are resident, and which of them are leaves: the bookkeeping that all policies share.

Blocks live in *slots* of flat arrays, found by the 64-bit hash of their id through chains in two more arrays: about 50 bytes a
block, where a dict of objects takes 300. A slot whose block is not resident but is the parent of resident ones is kept as a place
holder, so that blocks may come and go in any order (their parents may live on other nodes).
"""

from __future__ import annotations

from array import array

import numpy as np

from .base import BlockId, BlockInfo
from .ladder import Step, StepTable

NONE = -1


class BlockTable:
    """Slots of resident blocks. Public arrays are read by slot; only `add`, `remove` and `rung` change them.

    Attributes
    ----------
    parent : array of int32
        Slot of the parent, -1 at a root.
    children : array of int32
        Resident children.
    depth : array of int32
    rung, shape : array of uint8
        Where the block stands on its ladder, and which ladder (`StepTable`).
    resident : bytearray
        1 where the slot holds a resident block.
    ids : list
        Id by slot, None in a place holder's or a free slot.
    """

    def __init__(self) -> None:
        self.parent = array("i")
        self.children = array("i")
        self.depth = array("i")
        self.rung = array("B")
        self.shape = array("B")
        self.ids: list[BlockId | None] = []
        self.steps = StepTable()
        self.count = 0
        self.resident = bytearray()
        self._hash = array("q")
        self._next = array("i")
        self._heads = array("i", [NONE]) * 64
        self._free = array("i")
        self._holds: dict[BlockId, int] = {}

    def __len__(self) -> int:
        """Resident blocks."""
        return self.count

    @property
    def slots(self) -> int:
        """Slots ever made; arrays of a policy's own must be this long."""
        return len(self.ids)

    def find(self, id: BlockId) -> int:
        """Slot of a resident block, -1 if it is not resident."""
        slot = self._lookup(hash(id), id)
        return slot if slot >= 0 and self.resident[slot] else NONE

    def add(self, block: BlockInfo) -> int:
        """Make a block that is not resident resident at rung 0; its slot."""
        slot = self._slot_of(block.id)
        parent = NONE if block.parent is None else self._slot_of(block.parent)
        self.resident[slot] = 1
        self.parent[slot] = parent
        self.depth[slot] = block.depth
        self.rung[slot] = 0
        self.shape[slot] = self.steps.number(block.sizes, block.losses)
        self.count += 1
        if parent >= 0:
            self.children[parent] += 1
        return slot

    def remove(self, slot: int) -> int:
        """The block left. Answers the slot of its parent if that became a leaf by it, else -1."""
        parent = self.parent[slot]
        self.resident[slot] = 0
        self.count -= 1
        if not self.children[slot]:
            self._discard(slot)
        if parent < 0:
            return NONE
        self.children[parent] -= 1
        if self.children[parent]:
            return NONE
        if self.resident[parent]:
            return parent
        self._discard(parent)
        return NONE

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
        self._holds[id] = self._holds.get(id, 0) + 1

    def release(self, id: BlockId) -> bool:
        """Undo one hold; True when it was the last one."""
        left = self._holds.get(id, 0) - 1
        if left > 0:
            self._holds[id] = left
            return False
        return self._holds.pop(id, None) is not None

    def is_held(self, slot: int) -> bool:
        """Whether the block in the slot is held."""
        return bool(self._holds) and self.ids[slot] in self._holds

    def _lookup(self, hashed: int, id: BlockId) -> int:
        slot, hashes, following = self._heads[hashed & (len(self._heads) - 1)], self._hash, self._next
        while slot >= 0 and (hashes[slot] != hashed or self.ids[slot] != id):
            slot = following[slot]
        return slot

    def _slot_of(self, id: BlockId) -> int:
        hashed = hash(id)
        slot = self._lookup(hashed, id)
        return slot if slot >= 0 else self._allocate(hashed, id)

    def _allocate(self, hashed: int, id: BlockId) -> int:
        if self._free:
            slot = self._free.pop()
            self.ids[slot], self._hash[slot] = id, hashed
        else:
            slot = len(self.ids)
            self.ids.append(id)
            self._hash.append(hashed)
            for column in (self.parent, self._next):
                column.append(NONE)
            for column in (self.children, self.depth, self.rung, self.shape, self.resident):
                column.append(0)
            if slot >= len(self._heads):
                self._grow()
        head = hashed & (len(self._heads) - 1)
        self._next[slot], self._heads[head] = self._heads[head], slot
        return slot

    def _discard(self, slot: int) -> None:
        hashed, following = self._hash[slot], self._next
        head = hashed & (len(self._heads) - 1)
        at = self._heads[head]
        if at == slot:
            self._heads[head] = following[slot]
        else:
            while following[at] != slot:
                at = following[at]
            following[at] = following[slot]
        self.ids[slot] = None
        self._free.append(slot)

    def _grow(self) -> None:
        """Double the chains' heads. Runs only when no slot is free: every slot but the newest is in a chain."""
        self._heads = array("i", [NONE]) * (2 * len(self._heads))
        mask = len(self._heads) - 1
        for slot in range(len(self.ids) - 1):
            head = self._hash[slot] & mask
            self._next[slot], self._heads[head] = self._heads[head], slot
