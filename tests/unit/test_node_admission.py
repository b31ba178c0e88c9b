"""What a node takes in: requests told apart from calls, the waterline, quotas, and the reports that they come from."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from kvstore.arena import PageAllocator
from kvstore.block import LayerInfo
from kvstore.clock import ManualClock
from kvstore.errors import InvalidInputError
from kvstore.eviction import create
from kvstore.eviction.cluster import BINS, Pressure, bin_of
from kvstore.metadata import InprocMetadata, InprocState, NodeRecord
from kvstore.metadata.subjects import FLOORS, MAX_SUBJECTS, QUOTAS
from kvstore.node.config import NodeConfig
from kvstore.node.engine import NodeEngine
from kvstore.node.pressure import LESSONS_S, ClusterOrder, lessons_pause_s
from kvstore.node.requests import Requests
from kvstore.node.status import Status
from tests.node_support import NAMESPACE, block, key_of

PAGE = 512
OTHER = b"o" * 32


class Node:
    """An engine of `pages` pages, filled block by block."""

    def __init__(self, pages: int = 16, policy: str = "value") -> None:
        self.clock = ManualClock()
        config = NodeConfig(arena=pages * PAGE, page_bytes=PAGE)
        self.engine = NodeEngine(config, self.clock, create(policy), PageAllocator(pages))

    def put(self, number: int, namespace: bytes = NAMESPACE, pages: int = 1) -> Status:
        self.clock.advance(1.0)
        header = block(number, (pages * PAGE,), namespace=namespace).header
        decision = self.engine.reserve(header, self.engine.request(64, header.parent))
        return decision if isinstance(decision, Status) else self.engine.commit(decision)

    def held(self) -> set[int]:
        return {number for number in range(100) if self.engine.table.get(key_of(number))}

    def order(self, state: InprocState | None = None, incarnation: str = "a" * 16) -> ClusterOrder:
        return ClusterOrder(self.engine, InprocMetadata(self.clock, state), incarnation, 0.5)


def record(name: str, free: int, value: float, arena: int = 16 * PAGE, usage: str = "") -> NodeRecord:
    by_value = [0] * BINS
    by_value[bin_of(value)] = arena - free
    return NodeRecord(name, name * 16, f"{name}:1", arena_bytes=arena, pressure=Pressure(free, arena, by_value).to_text(), usage=usage)


def test_calls_of_one_prompt_are_one_request() -> None:
    clock = ManualClock()
    requests = Requests(clock)
    get = requests.begin(1000)
    requests.used(get, [b"a", b"b"])
    clock.advance(5.0)
    put = requests.begin(1000, b"b")
    assert (put.seq, put.now) == (get.seq, 5.0)
    requests.used(put, [b"c"])
    assert requests.begin(1000, b"c").seq == get.seq
    assert requests.begin(1500, b"c").seq != get.seq, "the next turn's prompt is longer"
    assert requests.begin(0, b"c").seq != get.seq
    assert requests.begin(1000, b"unknown").seq != get.seq
    clock.advance(61.0)
    assert requests.begin(1000, b"c").seq != get.seq
    assert requests.count == 5


def test_blocks_that_no_call_can_join_are_forgotten(monkeypatch) -> None:
    monkeypatch.setattr("kvstore.node.requests.MAX_BLOCKS", 4)
    clock = ManualClock()
    requests = Requests(clock)
    requests.used(requests.begin(1000), [b"a", b"b"])
    clock.advance(59.0)
    requests.used(requests.begin(1000), [b"c"])
    requests.used(requests.begin(1000), [b"d"])
    assert len(requests) == 4 and requests.begin(1000, b"b").seq == 1
    requests.used(requests.begin(1000, b"c"), [b"c"])
    assert len(requests) == 3, "of too many the older half"
    assert (requests.begin(1000, b"a").seq, requests.begin(1000, b"c").seq, requests.begin(1000, b"d").seq) == (4, 2, 3)
    clock.advance(61.0)
    for number in range(2):
        requests.used(requests.begin(1000), [b"e%d" % number])
        clock.advance(61.0)
    assert len(requests) == 2, "what is older than any call can join"
    for number in range(20):
        ids = [b"f%d %d" % (number, at) for at in range(number)]
        requests.used(last := requests.begin(1000), ids)
        assert len(requests) <= 4
        assert not ids or requests.begin(1000, ids[-1]).seq == last.seq


def test_a_block_below_the_waterline_is_not_admitted_but_remembered() -> None:
    node = Node(8)
    assert [node.put(number) for number in range(8)] == [Status.OK] * 8
    node.engine.policy.model.values = [[1.0] * len(row) for row in node.engine.policy.model.values]
    info = node.engine.table.get(key_of(0)).info
    assert node.engine.policy.worth(node.engine.request(64), info) == pytest.approx(1.0)
    node.engine.policy.model.values[0] = [1e-3] + [1.0] * (len(node.engine.policy.model.values[0]) - 1)
    node.engine.policy._candidates.stale()
    node.engine.admission.waterline = 0.5
    assert node.put(50) is Status.RESOURCE_EXHAUSTED
    assert node.engine.tally.rejected["waterline"] == 1
    assert node.put(50) is Status.OK, "the second time it is a block that came back"
    node.engine.check()
    node.engine.admission.waterline = 0.0
    assert node.put(51) is Status.OK, "below no waterline everything is admitted"


def test_what_follows_a_refused_block_is_refused_too() -> None:
    node = Node(4)
    chain = [block(60 + depth, (PAGE,), key_of(59 + depth) if depth else b"\0" * 32, depth=depth).header for depth in range(7)]
    request = node.engine.request(512)
    outcomes = []
    for header in chain:
        decision = node.engine.reserve(header, request)
        outcomes.append(decision if isinstance(decision, Status) else node.engine.commit(decision))
    assert outcomes == [Status.OK] * 4 + [Status.RESOURCE_EXHAUSTED] * 3, "a prompt larger than the node keeps its beginning"
    assert node.engine.tally.rejected["parent"] == 2
    assert node.engine.evict([key_of(63), key_of(62)]) == [Status.OK] * 2
    again = [node.engine.reserve(header, node.engine.request(512)) for header in (chain[2], chain[3])]
    assert not any(isinstance(decision, Status) for decision in again), "once there is room it is as welcome as any"


def test_what_is_only_told_of_was_asked_for_by_the_same_request_and_is_known_when_it_comes_back() -> None:
    node = Node(4)
    chain = [block(60 + depth, (PAGE,), key_of(59 + depth) if depth else b"\0" * 32, depth=depth).header for depth in range(8)]
    request = node.engine.request(512)
    for header in chain[:5]:
        decision = node.engine.reserve(header, request)
        assert node.engine.commit(decision) is Status.OK if header is not chain[4] else decision is Status.RESOURCE_EXHAUSTED
    for header in chain[5:]:
        told = replace(header, rows=(LayerInfo(0, 0, header.rows[0].distortion),))
        again = node.engine.request(512, header.parent)
        assert again.seq == request.seq
        assert node.engine.reserve(told, again) is Status.DATA_LOSS
    node.engine.check()
    policy = node.engine.policy
    assert len(node.engine.table) == len(policy.table) == 4
    assert all(policy._ghosts.find(header.key) for header in chain[5:])
    assert (policy.rival._asked, policy.rival._requests) == (7, 1), "all but the one for which no room could be made"


def test_the_waterline_is_that_of_all_nodes() -> None:
    node = Node(8)
    order = node.order()
    for number in range(8):
        node.put(number)
    order.hear([record("a", 0, 1.0), record("b", 0, 0.001)], None)
    low = node.engine.admission.waterline
    assert 0.0009 < low < 0.0015
    order.hear([record("b", 8 * PAGE, 0.001)], None)
    assert node.engine.admission.waterline == 0.0, "another node has room"


def test_a_report_is_at_most_a_quarter_second_or_20_requests_old() -> None:
    node = Node(64)
    order = node.order()
    first = order.report()
    assert order.report() is first
    for _ in range(20):
        node.engine.request()
    assert order.report() is not first
    second = order.report()
    node.clock.advance(0.3)
    assert order.report() is not second
    signed = order.sign(NodeRecord("a", "a" * 16, "a:1"))
    assert Pressure.from_text(signed.pressure, 0, 0) == order.report()
    assert NodeRecord.from_dict(json.loads(json.dumps(signed.to_dict()))) == signed


def test_a_young_node_exchanges_lessons_more_often() -> None:
    assert [lessons_pause_s(age_s, 0.5) for age_s in (0.0, 4.0, 20.0, 1e6)] == [0.5, 0.5, 2.0, LESSONS_S]


async def test_nodes_learn_from_each_other() -> None:
    state, one, two = InprocState(), Node(64), Node(64)
    orders = one.order(state, "a" * 16), two.order(state, "b" * 16)
    for number in range(10):
        one.put(number)
        one.engine.policy.model.used(0, 5.0, 50)
    one.engine.policy._learn(one.clock.now())
    for order in orders:
        order.hear([record("a", 0, 1.0), record("b", 0, 1.0)], None)
        await order.learn()
    await orders[1].learn()
    assert two.engine.policy.model._others.sum() > 0


def test_a_tenant_over_its_quota_gives_up_its_own_oldest_blocks() -> None:
    node = Node(16)
    subject = NAMESPACE.hex()
    order = node.order()
    order.hear([], json.dumps({subject: 4 * PAGE}).encode())
    assert [node.put(number, OTHER) for number in range(10, 18)] == [Status.OK] * 8
    assert [node.put(number) for number in range(6)] == [Status.OK] * 6
    assert node.held() == {2, 3, 4, 5, *range(10, 18)}
    assert node.engine.tally.evictions == {"quota": 2}
    assert node.engine.admission.quotas.usage() == {subject: 4 * PAGE}
    node.engine.check()


def test_what_other_nodes_hold_counts_against_the_quota() -> None:
    node = Node(16)
    subject = NAMESPACE.hex()
    usage = json.dumps({subject: 3 * PAGE})
    node.order().hear([record("b", 0, 1.0, usage=usage)], json.dumps({subject: 4 * PAGE}).encode())
    assert [node.put(number) for number in range(3)] == [Status.OK] * 3
    assert node.held() == {2}
    node.order().hear([record("b", 0, 1.0, usage=usage)], json.dumps({subject: 2 * PAGE}).encode())
    assert node.put(3) is Status.RESOURCE_EXHAUSTED, "nothing that goes here makes room for it"
    assert node.engine.tally.rejected["quota"] == 1


def test_held_blocks_of_a_tenant_stay() -> None:
    node = Node(16)
    node.order().hear([], json.dumps({NAMESPACE.hex(): 2 * PAGE}).encode())
    node.put(0)
    node.put(1)
    node.engine.holds.pin([key_of(0)], 60)
    assert node.put(2) is Status.OK
    assert node.held() == {0, 2}
    node.engine.holds.pin([key_of(2)], 60)
    assert node.put(3) is Status.RESOURCE_EXHAUSTED
    node.engine.check()


@pytest.mark.parametrize("value", [b"[]", b"{", b'{"a": -1}', b'{"a": "b"}', b'{"a": true}'])
def test_quotas_that_cannot_be_read_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidInputError):
        QUOTAS.parse(value)
    assert QUOTAS.parse(None) == {}


async def test_quotas_are_kept_in_the_metadata() -> None:
    metadata = InprocMetadata(ManualClock())
    assert await QUOTAS.set(metadata, "alice", 100) == {"alice": 100}
    assert await QUOTAS.set(metadata, "bob", 5) == {"alice": 100, "bob": 5}
    assert await QUOTAS.set(metadata, "alice", None) == {"bob": 5} == await QUOTAS.read(metadata)
    for subject, size in (("", 1), ("x" * 65, 1), ("carol", -1), ("a\nb", 1)):
        with pytest.raises(InvalidInputError):
            await QUOTAS.set(metadata, subject, size)
    for number in range(MAX_SUBJECTS - 1):
        await QUOTAS.set(metadata, f"tenant {number}", 1)
    with pytest.raises(InvalidInputError):
        await QUOTAS.set(metadata, "one too many", 1)


def test_usage_that_cannot_be_read_is_nothing() -> None:
    node = Node(16)
    for usage in ("nonsense", "[1]", '{"x": "y"}', ""):
        node.order().hear([record("b", 0, 1.0, usage=usage)], b'{"x": 5}')
        assert node.engine.admission.quotas.over(["x"], 5) is None


LAYERS = (PAGE, PAGE)


def put_layers(node: Node, number: int, namespace: bytes) -> Status:
    """A block of two layers, of error 0.1 and 0.05."""
    node.clock.advance(1.0)
    header = block(number, LAYERS, namespace=namespace).header
    decision = node.engine.reserve(header, node.engine.request(64, header.parent))
    return decision if isinstance(decision, Status) else node.engine.commit(decision)


def fidelities(node: Node) -> dict[int, int]:
    return {number: node.engine.table.get(key_of(number)).header.present for number in node.held()}


@pytest.mark.parametrize(("floor", "demoted"), [(0.2, True), (0.07, False), (0.0, False)])
def test_the_ladder_ends_at_a_tenants_floor(floor: float, demoted: bool) -> None:
    node = Node(8, "lru")
    node.order().hear([], None, json.dumps({NAMESPACE.hex(): floor}).encode())
    assert [put_layers(node, number, NAMESPACE) for number in range(6)] == [Status.OK] * 6
    assert (1 in fidelities(node).values()) is demoted
    assert bool(node.engine.tally.evictions["pressure"]) is not demoted
    node.engine.check()


def test_a_floor_is_one_tenants_alone_and_holds_for_blocks_that_are_older() -> None:
    node = Node(8, "lru")
    assert [put_layers(node, number, OTHER if number % 2 else NAMESPACE) for number in range(4)] == [Status.OK] * 4
    node.order().hear([], None, json.dumps({NAMESPACE.hex(): 0.07}).encode())
    assert [put_layers(node, number, OTHER) for number in range(4, 8)] == [Status.OK] * 4
    mine = {number: fidelity for number, fidelity in fidelities(node).items() if number in (0, 2)}
    assert set(mine.values()) <= {2}, "dropped or whole"
    assert 1 in fidelities(node).values()
    node.engine.check()


@pytest.mark.parametrize("value", [b'{"a": -0.1}', b'{"a": "b"}', b'{"a": Infinity}', b'{"a": NaN}', b'{"a": true}'])
def test_floors_that_cannot_be_read_are_refused(value: bytes) -> None:
    with pytest.raises(InvalidInputError):
        FLOORS.parse(value)
    assert FLOORS.parse(b'{"a": 0.5, "b": 0}') == {"a": 0.5, "b": 0}
