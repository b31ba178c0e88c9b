"""The learnt order, tried in a store that holds no bytes.

While it knows little, the learnt order may lose much against recency, or win much: `rival` must not let the store follow it far, and
would so never see what it is worth. So from the first block that has to leave it also runs alone, in as much room as the store has, on the
same requests. What it wins there costs nothing to know, and a part of it is what the store may risk. (To choose between policies by what
each would have hit is the way of ACME, Ari et al., 2002.) A trial takes as much time and memory as the policy itself, and so ends when
what it could win could not change anything any more.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .base import BlockInfo, Request

if TYPE_CHECKING:
    from .value import ValuePolicy

#: Steps that are taken at most for each block of a request: a store that is emptied at once must not stand still for its trial.
_STEPS_PER_BLOCK, _STEPS = 4, 64


class Trial:
    """A copy of a policy, which recency never leads, and its own store, of which there is nothing but the policy's table."""

    def __init__(self, policy: ValuePolicy) -> None:
        table = policy.table
        flat = {id(column): column[:] for column in (table.ids, table.children, table.depth)}  # what would take a call for each block
        self.learnt = copy.deepcopy(policy, flat)
        self.learnt.rival.watches = True

    def access(self, request: Request, blocks: Sequence[BlockInfo], room: float) -> int:
        """The store has room for `room` whole blocks. Answers the blocks hit so far beyond what recency would have hit."""
        learnt = self.learnt
        for _ in range(_STEPS + _STEPS_PER_BLOCK * len(blocks)):
            if learnt.table.size <= room or (victim := learnt.victim(request.now)) is None:
                break
            if victim.rung is None:
                learnt.removed(victim.id)
            else:
                learnt.demoted(victim.id, victim.rung)
        learnt.access(request, blocks)
        return learnt.rival.gained
