"""The engine against a model that knows every byte: hypothesis drives puts, gets, pins, leases, evictions and time.

The "arena" here is a dict page -> token: committing writes the block's own token into each of its pages, and a reader finds either
that token in all of them or learns from `intact` that the block is gone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from unittest.mock import patch

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, precondition, rule

from kvstore.arena import PageAllocator
from kvstore.block import BlockHeader, Distortion, Provenance
from kvstore.clock import ManualClock
from kvstore.eviction import BlockInfo, EvictionPolicy, Request, Victim, create, names
from kvstore.identity import NO_PARENT
from kvstore.node.config import NodeConfig
from kvstore.node.engine import Entry, Found, NodeEngine, Reservation
from kvstore.node.status import Status
from tests.node_support import block, key_of

PAGE = 512
PAGES = 16
KEYS = st.integers(0, 5)
POLICIES = ["ladder", *(name for name in names() if name != "opt")]  # opt needs to know the future
CONFIG = NodeConfig(arena=PAGES * PAGE, page_bytes=PAGE, max_leases=4, get_hold_s=5.0)


class LadderLru(EvictionPolicy):
    """The oldest block that is not held: demoted a layer at a time, then dropped. Ignores parents, unlike a real policy."""

    name = "ladder-lru"

    def __init__(self) -> None:
        super().__init__()
        self.order: dict[bytes, tuple[BlockInfo, int]] = {}
        self.holds: dict[bytes, int] = {}

    def access(self, request: Request, blocks: list[BlockInfo]) -> None:
        for info in blocks:
            self.order[info.id] = self.order.pop(info.id, (info, 0))

    def victim(self, now: float) -> Victim | None:
        for key, (info, rung) in self.order.items():
            if not self.holds.get(key):
                return Victim(key, rung + 1 if rung + 1 < len(info.sizes) else None)
        return None

    def removed(self, id: bytes) -> None:
        self.order.pop(id, None)

    def demoted(self, id: bytes, rung: int) -> None:
        self.order[id] = (self.order[id][0], rung)

    def hold(self, id: bytes) -> None:
        self.holds[id] = self.holds.get(id, 0) + 1

    def release(self, id: bytes) -> None:
        self.holds[id] -= 1


@dataclass
class Known:
    """What the model knows of a visible block."""

    header: BlockHeader
    token: int


def header_of(number: int, layers: int, error: float, clean: bool, depth: int) -> BlockHeader:
    sizes = [300 + 170 * number + 90 * i for i in range(layers)]
    prefix = Provenance() if clean else Provenance(1, Distortion(0.5, 0.5))
    parent = key_of(number - 1) if depth else NO_PARENT
    return block(number, sizes, parent, depth=depth, error=error, provenance=prefix).header


class NodeMachine(RuleBasedStateMachine):
    """See the module."""

    writing = Bundle("writing")
    leases = Bundle("leases")

    @initialize(policy=st.sampled_from(POLICIES))
    def start(self, policy: str) -> None:
        self.clock = ManualClock()
        self.changed: set[bytes] = set()
        self.engine = NodeEngine(
            CONFIG, self.clock, LadderLru() if policy == "ladder" else create(policy), PageAllocator(PAGES), self.changed.add
        )
        self.model: dict[bytes, Known] = {}
        self.index: dict[bytes, int] = {}
        self.arena: dict[int, int] = {}
        self.pins: dict[bytes, float] = {}
        self.held: dict[int, tuple[float, list[bytes]]] = {}
        self.readers: list[tuple[Found, int]] = []
        self.unused: list[list[Entry | None]] = []
        self.tokens = iter(range(1, 10**9))

    # ---- writers

    @rule(
        target=writing, number=KEYS, layers=st.integers(1, 3),
        error=st.sampled_from([0.4, 0.1]), clean=st.booleans(), depth=st.integers(0, 1),
    )  # fmt: skip
    def reserve(self, number: int, layers: int, error: float, clean: bool, depth: int):
        header = header_of(number, layers, error, clean, depth)
        before = self.engine.reserved_bytes
        decision = self.engine.reserve(header, self.engine.request())
        self.follow_victims()
        if isinstance(decision, Status):
            assert decision in (Status.BUSY, Status.ALREADY_EXISTS, Status.RESOURCE_EXHAUSTED)
            assert self.engine.reserved_bytes == before
            return multiple()
        for extents, row in zip(decision.layers, header.rows, strict=True):
            assert sum(e.count for e in extents) == -(-row.size_bytes // PAGE)
        return decision

    @rule(target=writing, numbers=st.lists(st.integers(0, 2), min_size=1, max_size=4), layers=st.integers(1, 2))
    def reserve_run(self, numbers: list[int], layers: int):
        headers = [header_of(number, layers, 0.2, True, 1) for number in numbers]
        before, changes = self.engine.free_bytes, len(self.changed)
        run = self.engine.reserve_run(headers, self.engine.request())
        assert [reservation.header for reservation in run] == headers[: len(run)]
        assert len({r.header.key for r in run} - self.model.keys()) == len(run), "each is new, and once"
        assert (len(self.changed), before - self.engine.free_bytes) == (changes, PAGE * sum(r.pages for r in run)), "nothing leaves"
        return multiple(*run)

    @rule(blocks=st.lists(st.tuples(KEYS, st.integers(1, 3), st.integers(0, 1)), min_size=1, max_size=5))
    def put(self, blocks: list[tuple[int, int, int]]) -> None:
        for number, layers, depth in blocks:
            reservation = self.reserve(number, layers, 0.2, True, depth)
            if isinstance(reservation, Reservation):
                self.commit(reservation)

    @rule(reservation=consumes(writing))
    def commit(self, reservation: Reservation) -> None:
        token = next(self.tokens)
        self.fill(reservation.layers, token)
        key, old = reservation.header.key, self.model.get(reservation.header.key)
        status = self.engine.outcome(reservation)
        assert status is self.engine.commit(reservation)
        if status is Status.OK:
            assert key not in self.protected(), "a pinned or leased block is not replaced"
            self.model[key] = Known(reservation.header, token)
        else:
            assert old is not None
            assert status in (Status.ALREADY_EXISTS, Status.BUSY)
        if old is not None and not old.header.provenance.exact and reservation.header.provenance.exact:
            assert status is not Status.ALREADY_EXISTS, "a clean block gives way to none that is contaminated"
        if old is not None and old.header.provenance.exact and not reservation.header.provenance.exact:
            assert status is not Status.OK, "a contaminated block replaces no clean one"

    @rule(reservation=consumes(writing))
    def abort(self, reservation: Reservation) -> None:
        self.fill(reservation.layers, -1)
        self.engine.abort(reservation)

    # ---- readers

    @rule(numbers=st.lists(KEYS, min_size=1, max_size=3), fidelity=st.integers(0, 3), done=st.booleans())
    def get(self, numbers: list[int], fidelity: int, done: bool) -> None:
        keys = [key_of(n) for n in numbers]
        entries = self.engine.find(keys)
        lease = self.engine.lease(entries)
        for key, entry in zip(keys, entries, strict=True):
            found = entry and Found.of(entry, fidelity)
            assert (found is None) == (key not in self.model), "a get returns exactly what was put and not dropped"
            if found is not None:
                known = self.model[key]
                assert found.header == known.header.truncate(min(fidelity or 3, known.header.present))
                self.readers.append((found, known.token))
        if done:
            self.engine.used(entries, self.engine.request())
            self.engine.holds.release(lease)
        else:
            self.unused.append(entries)
            self.remember_lease(lease, keys, CONFIG.get_hold_s)

    @precondition(lambda self: self.unused)
    @rule()
    def use_late(self) -> None:
        """A reader is done whose blocks may have been dropped, or replaced, meanwhile."""
        self.engine.used(self.unused.pop(0), self.engine.request())

    @rule(target=leases, numbers=st.lists(KEYS, min_size=1, max_size=4), seconds=st.integers(1, 20))
    def lookup(self, numbers: list[int], seconds: int):
        keys = [key_of(n) for n in numbers]
        entries, lease = self.engine.lookup(keys, float(seconds))
        assert [e is not None for e in entries] == [key in self.model for key in keys]
        self.remember_lease(lease, keys, seconds)
        return lease

    @rule(lease=leases)
    def release(self, lease: int) -> None:
        self.engine.holds.release(lease)
        self.held.pop(lease, None)

    # ---- owners

    @rule(number=KEYS, ttl=st.integers(1, 30))
    def pin(self, number: int, ttl: int) -> None:
        key = key_of(number)
        self.forget_expired()
        (status,) = self.engine.holds.pin([key], ttl)
        assert (status is Status.NOT_FOUND) == (key not in self.model)
        if status is Status.OK:
            self.pins[key] = max(self.pins.get(key, 0.0), self.clock.now() + ttl)

    @rule(number=KEYS)
    def unpin(self, number: int) -> None:
        key = key_of(number)
        self.engine.holds.expire()
        self.forget_expired()
        (status,) = self.engine.holds.unpin([key])
        assert (status is Status.OK) == (self.pins.pop(key, None) is not None)

    @rule(number=KEYS)
    def evict(self, number: int) -> None:
        key = key_of(number)
        (status,) = self.engine.evict([key])
        if status is Status.OK:
            assert key not in self.protected()
            del self.model[key]
        elif status is Status.NOT_FOUND:
            assert key not in self.model

    @rule(seconds=st.sampled_from([0.5, 3.0, 10.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.engine.holds.expire()
        self.forget_expired()
        assert {n for n in range(6) if key_of(n) in self.engine.holds.pins} == {n for n in range(6) if key_of(n) in self.pins}

    # ---- what must hold between any two steps

    @invariant()
    def no_reader_is_told_that_other_bytes_are_its_own(self) -> None:
        for found, token in self.readers:
            if self.engine.intact(found):
                pages = {p for layer in found.layers for e in layer for p in range(e.start, e.start + e.count)}
                assert {self.arena[page] for page in pages} == {token}
        self.readers = [(found, token) for found, token in self.readers if self.engine.intact(found)][-8:]

    @invariant()
    def the_account_adds_up(self) -> None:
        engine = self.engine
        assert engine.used_bytes + engine.free_bytes + engine.reserved_bytes == engine.arena_bytes
        engine.check()
        assert engine.holds.pins.bytes <= engine.arena_bytes // 2
        assert engine.holds.leases.bytes <= engine.arena_bytes // 4
        assert len(engine.holds.leases) <= CONFIG.max_leases

    @invariant()
    def the_table_is_the_model(self) -> None:
        assert {e.key: e.header for e in self.engine.table} == {key: known.header for key, known in self.model.items()}
        assert self.engine.table.raw_bytes == sum(k.header.raw_bytes for k in self.model.values())
        assert self.engine.table.stored_by_codec.total() == sum(k.header.total_bytes for k in self.model.values())

    @invariant()
    def the_index_follows_from_the_changes(self) -> None:
        for key in self.changed:
            self.index.pop(key, None)
            if key in self.model:
                self.index[key] = self.model[key].header.present
        self.changed.clear()
        assert self.index == {key: known.header.present for key, known in self.model.items()}

    # ---- the model's own steps

    def fill(self, layers: list, token: int) -> None:
        for extents in layers:
            for extent in extents:
                for page in range(extent.start, extent.start + extent.count):
                    self.arena[page] = token

    def follow_victims(self) -> None:
        """Take over what making room dropped or demoted, which may be anything but what is protected."""
        now_here = {e.key: e.header for e in self.engine.table}
        for key in list(self.model):
            header = now_here.get(key)
            if header == self.model[key].header:
                continue
            assert key not in self.protected(), "a pinned or leased block is neither dropped nor demoted"
            if header is None:
                del self.model[key]
            else:
                assert header == self.model[key].header.truncate(header.present)
                self.model[key] = replace(self.model[key], header=header)

    def remember_lease(self, lease: int, keys: list[bytes], seconds: float) -> None:
        if lease:
            held = set(self.engine.holds.leases._leases[lease][0])
            self.held[lease] = (self.clock.now() + seconds, [key for key in keys if key in held])

    def protected(self) -> set[bytes]:
        now = self.clock.now()
        leased = {key for until, keys in self.held.values() if until > now for key in keys}
        return leased | {key for key, until in self.pins.items() if until > now}

    def forget_expired(self) -> None:
        now = self.clock.now()
        self.pins = {key: until for key, until in self.pins.items() if until > now}
        self.held = {lease: held for lease, held in self.held.items() if held[0] > now}

    def teardown(self) -> None:
        """With every promise ended, everything can be dropped and the arena is whole again."""
        if not hasattr(self, "engine"):
            return
        for reservation in list(self.engine._writing.values()):
            self.engine.abort(reservation)
        self.clock.advance(10**6)
        assert set(self.engine.evict(list(self.model))) <= {Status.OK}
        assert self.engine.free_bytes == self.engine.arena_bytes
        self.engine.check()


TestNodeEngine = NodeMachine.TestCase
TestNodeEngine.settings = settings(max_examples=150, stateful_step_count=40, deadline=None, derandomize=True)


@pytest.fixture
def engine() -> NodeEngine:
    return NodeEngine(CONFIG, ManualClock(), create("lru"), PageAllocator(PAGES))


def store(engine: NodeEngine, header: BlockHeader) -> Status:
    decision = engine.reserve(header, engine.request())
    return decision if isinstance(decision, Status) else engine.commit(decision)


def test_making_room_for_a_child_never_costs_its_parent(engine: NodeEngine) -> None:
    parent = block(0, (PAGE * 12,)).header
    assert store(engine, parent) is Status.OK
    child = block(1, (PAGE * 13,), parent.key, depth=1).header
    assert store(engine, child) is Status.RESOURCE_EXHAUSTED
    assert engine.table.get(parent.key) is not None
    assert engine.tally.rejected == {"no_room": 1}
    engine.check()


def test_more_layers_replace_fewer_and_not_the_other_way_round(engine: NodeEngine) -> None:
    full = block(0, (600, 700, 800))
    assert store(engine, full.truncate(1).header) is Status.OK
    assert store(engine, full.header) is Status.OK
    assert store(engine, full.truncate(2).header) is Status.ALREADY_EXISTS
    assert engine.table.get(full.header.key).header.present == 3
    assert engine.tally.evictions == {"replaced": 1}


def test_a_block_larger_than_the_arena_or_without_bytes_is_refused(engine: NodeEngine) -> None:
    assert store(engine, block(0, (PAGE * PAGES + 1,)).header) is Status.RESOURCE_EXHAUSTED
    assert store(engine, block(0, (0,)).header) is Status.DATA_LOSS
    assert len(engine.table) == 0


def test_a_block_that_a_reader_took_while_a_better_one_was_written_stays(engine: NodeEngine) -> None:
    worse, better = block(0, (600,), error=0.4), block(0, (600, 600), error=0.1)
    assert store(engine, worse.header) is Status.OK
    reservation = engine.reserve(better.header, engine.request())
    (entry,) = engine.find([worse.header.key])
    found, lease = Found.of(entry, 0), engine.lease([entry])
    assert engine.commit(reservation) is Status.BUSY
    assert engine.intact(found)
    engine.holds.release(lease)
    engine.check()
    assert store(engine, better.header) is Status.OK
    assert not engine.intact(found)


@pytest.mark.parametrize("policy", POLICIES[1:])
def test_a_block_that_is_asked_for_many_times_in_one_get_is_used_once(policy: str) -> None:
    engine = NodeEngine(CONFIG, ManualClock(), create(policy), PageAllocator(PAGES))
    one = block(0, (PAGE * 3,)).header
    assert store(engine, one) is Status.OK
    entries = engine.find([one.key] * 8)
    engine.holds.release(engine.lease(entries))
    engine.used(entries, engine.request())
    assert store(engine, block(1, (PAGE * (PAGES - 1),)).header) is Status.OK
    assert engine.table.get(one.key) is None
    engine.check()


def test_a_better_copy_that_is_refused_leaves_the_policy_its_resident_block() -> None:
    """Found by simulation, seed 3047: the policy forgot the resident block, which then could not be dropped, or was demoted upwards."""
    engine = NodeEngine(CONFIG, ManualClock(), create("value"), PageAllocator(PAGES))
    worse, better = block(0, (PAGE * 4,), error=0.4), block(0, (PAGE * 6, PAGE * 6), error=0.1)
    assert store(engine, worse.header) is Status.OK
    assert store(engine, block(1, (PAGE * 12,)).header) is Status.OK
    engine.admission.waterline = 1e9  # nothing is worth as much: every newcomer that needs room is refused
    with patch.object(engine.policy, "worth", lambda request, info: 0.0):
        assert store(engine, better.header) is Status.RESOURCE_EXHAUSTED
    engine.admission.waterline = 0.0
    while (victim := engine.policy.victim(engine.clock.now())) is not None:  # the policy still names every resident block
        engine.evict([victim.id])
    assert len(engine.table) == 0
