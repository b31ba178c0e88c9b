"""Every policy in the table against a plain model: what it names is resident, free to go, and, for a drop, a leaf."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, precondition, rule

from kvstore.eviction import BlockInfo, Request, create, names, policy_class

SIZES, LOSSES = (64, 24, 8), (0.0, 0.02, 0.1)
ONLINE = [name for name in names() if not policy_class(name).sees_future]


class PolicyMachine(RuleBasedStateMachine):
    """Chains come and go as in a node: blocks are lost at random, held, demoted, promoted and written in part."""

    chains = Bundle("chains")
    name = ""

    @initialize()
    def start(self) -> None:
        self.policy = create(self.name)
        self.seq, self.now = 0, 0.0
        self.made: dict[bytes, BlockInfo] = {}
        self.rung: dict[bytes, int] = {}
        self.holds: dict[bytes, int] = {}

    def _block(self, parent: bytes | None, label: int, depth: int, sizes: int) -> BlockInfo:
        id = (parent or b"") + bytes([label])
        return self.made.setdefault(id, BlockInfo(id, parent, depth, SIZES[:sizes], LOSSES[:sizes], partial=label == 3))

    @rule(target=chains, labels=st.lists(st.integers(0, 3), min_size=1, max_size=6), rungs=st.integers(1, 3))
    def make(self, labels: list[int], rungs: int) -> tuple[bytes, ...]:
        chain: list[bytes] = []
        for depth, label in enumerate(labels):
            chain.append(self._block(chain[-1] if chain else None, label, depth, rungs).id)
        return tuple(chain)

    @rule(chain=chains, skip=st.sets(st.integers(0, 5), max_size=2), later=st.floats(0, 500), tokens=st.integers(0, 20_000))
    def use(self, chain: tuple[bytes, ...], skip: set[int], later: float, tokens: int) -> None:
        """Parts of a chain may live on other nodes: `skip` names depths that this node never sees."""
        self.seq += 1
        self.now += later
        blocks = [self.made[id] for depth, id in enumerate(chain) if depth not in skip]
        self.policy.access(Request(self.seq, self.now, tokens), blocks)
        for block in blocks:
            self.rung.setdefault(block.id, 0)

    @precondition(lambda self: self.rung)
    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.rung)))
        del self.rung[id]
        self.policy.removed(id)

    @rule(chain=chains)
    def hold(self, chain: tuple[bytes, ...]) -> None:
        self.holds[chain[-1]] = self.holds.get(chain[-1], 0) + 1
        self.policy.hold(chain[-1])

    @rule(chain=chains)
    def release(self, chain: tuple[bytes, ...]) -> None:
        id = chain[-1]
        if self.holds.get(id, 0):
            self.holds[id] -= 1
            self.policy.release(id)

    @precondition(lambda self: self.rung)
    @rule(data=st.data())
    def promote(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.rung)))
        self.rung[id] = 0
        self.policy.promoted(id)

    @rule(times=st.integers(1, 12), later=st.floats(0, 50))
    def evict(self, times: int, later: float) -> None:
        self.now += later
        for _ in range(times):
            victim = self.policy.victim(self.now)
            assert victim == self.policy.victim(self.now), "peeking twice names the same block"
            if victim is None:
                assert not self._free_leaves(), "a leaf that nobody holds can always go"
                return
            assert victim.id in self.rung, "resident"
            assert not self.holds.get(victim.id), "not held"
            if victim.rung is None:
                assert victim.id in self._leaves(), "leaves first"
                del self.rung[victim.id]
                self.policy.removed(victim.id)
            else:
                assert self.rung[victim.id] < victim.rung < len(self.made[victim.id].sizes), "one of its lower rungs"
                self.rung[victim.id] = victim.rung
                self.policy.demoted(victim.id, victim.rung)

    def _leaves(self) -> set[bytes]:
        return set(self.rung) - {self.made[id].parent for id in self.rung}

    def _free_leaves(self) -> set[bytes]:
        return {id for id in self._leaves() if not self.holds.get(id)}

    @invariant()
    def unknown_ids_are_ignored(self) -> None:
        if hasattr(self, "policy"):
            self.policy.removed(b"never seen")


@pytest.mark.parametrize("name", ONLINE)
def test_policy_against_a_model(name: str) -> None:
    machine = type(f"{name}Machine", (PolicyMachine,), {"name": name})
    machine.TestCase.settings = settings(max_examples=15, stateful_step_count=40, deadline=None)
    machine.TestCase("runTest").runTest()
