"""Leases and pins are bounded in time, number and bytes."""

from __future__ import annotations

import random

from kvstore.node.leases import LeaseTable, PinTable


def test_a_lease_takes_the_longest_run_that_the_bytes_allow() -> None:
    leases = LeaseTable(max_leases=10, max_bytes=100, rng=random.Random(1))
    lease, keys = leases.grant([(b"a", 40), (b"b", 40), (b"c", 40)], until=5.0)
    assert lease
    assert keys == [b"a", b"b"]
    assert (leases.bytes, leases.holds, len(leases)) == (80, 2, 1)
    assert leases.grant([(b"c", 40)], until=5.0) == (0, [])
    assert leases.release(lease) == [b"a", b"b"]
    assert (leases.bytes, leases.holds, len(leases)) == (0, 0, 0)
    assert leases.release(lease) == []


def test_leases_are_bounded_in_number() -> None:
    leases = LeaseTable(max_leases=2, max_bytes=100, rng=random.Random(1))
    granted = [leases.grant([(b"a", 1)], until=1.0)[0] for _ in range(3)]
    assert [bool(lease) for lease in granted] == [True, True, False]


def test_leases_end_by_themselves_and_early_releases_leave_no_trace() -> None:
    leases = LeaseTable(max_leases=1000, max_bytes=10_000, rng=random.Random(1))
    early = [leases.grant([(b"e", 1)], until=100.0)[0] for _ in range(500)]
    late, _ = leases.grant([(b"l", 1)], until=2.0)
    for lease in early:
        leases.release(lease)
    assert leases.expire(1.0) == []
    assert leases.expire(2.0) == [b"l"]
    assert leases.release(late) == []
    assert (len(leases), leases.bytes) == (0, 0)


def test_pins_are_prolonged_never_shortened_and_bounded_in_bytes() -> None:
    pins = PinTable(max_bytes=100)
    assert pins.pin(b"a", 60, until=10.0) is True
    assert pins.pin(b"a", 60, until=5.0) is False
    assert pins.pin(b"b", 60, until=10.0) is None
    assert pins.expire(5.0) == []
    assert pins.expire(10.0) == [b"a"]
    assert pins.bytes == 0
    assert pins.unpin(b"a") is False
