"""Pressure reports, the waterline and placement."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidInputError
from kvstore.eviction import cluster_replay
from kvstore.eviction.cluster import BINS, Placer, Pressure, bin_of, is_admitted, value_of, waterline
from kvstore.eviction.cluster_replay import replay_cluster
from kvstore.eviction.reuse import EDGES_S, ReuseModel, bucket
from kvstore.eviction.trace import Trace


def pressure(free: int, *pairs: tuple[float, int]) -> Pressure:
    by_value = [0] * BINS
    for value, size in pairs:
        by_value[bin_of(value)] += size
    return Pressure(free, free + sum(by_value), by_value)


@given(st.lists(st.integers(0, 2**40), min_size=BINS, max_size=BINS), st.integers(0, 2**40))
def test_reports_survive_the_wire_and_are_bounded(sizes: list[int], free: int) -> None:
    report = Pressure(free, free + sum(sizes), sizes)
    blob = report.to_bytes()
    assert len(blob) <= 24 + 9 * BINS
    assert Pressure.from_bytes(blob) == report


@given(st.binary(max_size=200))
def test_any_bytes_are_a_report_or_refused(blob: bytes) -> None:
    with pytest.raises(InvalidInputError):
        Pressure.from_bytes(blob)
    header = pressure(5, (1.0, 7)).to_bytes()
    with contextlib.suppress(InvalidInputError):
        assert sum(Pressure.from_bytes(header[:24] + blob).bytes_by_value) >= 0


@given(st.floats(2**-23, 2**7))
def test_bins_hold_the_values_just_below_their_edge(value: float) -> None:
    assert value_of(bin_of(value) - 1) < value * 1.0000001 and value <= value_of(bin_of(value)) * 1.0000001


def test_a_report_scales_a_sample_to_the_bytes_in_use() -> None:
    report = Pressure.of(100, 1100, np.array([0.5, 0.5, 0.001, 0.0]), np.array([1.0, 0.5, 0.25, 0.25]))
    assert sum(report.bytes_by_value) == 1000
    assert report.bytes_by_value[bin_of(0.5)] == 750
    assert report.bytes_by_value[0] == 125


def test_nodes_learn_from_each_other_and_refuse_nonsense() -> None:
    teacher, pupil = ReuseModel([(0,), (1,), ()]), ReuseModel([(0,), (1,), ()])
    waiting = np.zeros((3, len(EDGES_S)))
    for _ in range(500):
        teacher.used(1, 10.0)
    teacher.learn(waiting, 100)
    pupil.heed([teacher.lessons()])
    pupil.learn(waiting, 100)
    assert pupil.values[1][bucket(9.0)] > 10 * pupil.values[2][bucket(9.0)]
    taught = pupil.lessons()
    assert np.frombuffer(taught, dtype="<f4").sum() == 0.0, "what was heard is not passed on as one's own"
    for wrong in (b"", taught[:-4], np.full(2 * waiting.size, np.nan, "<f4").tobytes(), np.full(2 * waiting.size, -1, "<f4").tobytes()):
        with pytest.raises(InvalidInputError):
            pupil.heed([wrong])


def test_the_waterline_is_where_the_needed_bytes_end() -> None:
    reports = [pressure(0, (0.01, 100), (1.0, 100)), pressure(50, (0.1, 100))]
    assert waterline(reports, 50) == 0.0
    assert waterline(reports, 150) == value_of(bin_of(0.01))
    assert waterline(reports, 151) == value_of(bin_of(0.1))
    assert waterline(reports, 10**6) == float("inf")


def test_new_blocks_go_to_the_least_valuable_bytes_and_the_herd_is_spread() -> None:
    placer = Placer(tolerance=(2.0, 2.0, 2.0))
    assert placer.choose([1], 1) is None
    placer.update({"a": pressure(0, (0.01, 100), (1.0, 500)), "b": pressure(0, (0.1, 600)), "c": pressure(0, (0.01, 90), (2.0, 500))})
    assert placer.choose([1, 2], 100) == "a"
    assert placer.choose([3], 90) == "c"
    assert placer.choose([4], 10) == "b"


def test_a_run_prefers_its_old_node_then_its_parents_then_home() -> None:
    reports = {node: pressure(0, (0.1, 1000)) for node in "abcd"} | {"e": pressure(0, (4.0, 1000))}
    placer = Placer(home="d", remember_blocks=2)
    placer.update(reports)
    assert placer.choose([1, 2], 10) == "d"
    placer.home = "c"
    assert placer.choose([1], 10, parent="b") == "d"
    assert placer.choose([7], 10, parent="b") == "b"
    assert placer.choose([8], 10, parent="e") == "c", "bytes at the parent's node are worth too much"
    assert placer.choose([1], 10) == "c", "only the newest two are remembered"
    placer.update({"a": reports["a"]})
    assert placer.choose([8], 10) == "a", "nodes that left are not chosen"


def test_a_price_is_the_mean_value_of_what_leaves() -> None:
    report = pressure(100, (0.01, 100), (1.0, 100))
    cheap, dear = value_of(bin_of(0.01)), value_of(bin_of(1.0))
    assert report.price(100) == 0.0
    assert report.price(150) == pytest.approx(50 * cheap / 150)
    assert report.price(250) == pytest.approx((100 * cheap + 50 * dear) / 250)
    assert report.price(301) == float("inf")


def test_admission_tells_values_apart_as_finely_as_reports() -> None:
    assert is_admitted(0.1, 0.1, 0.05) and is_admitted(float("inf"), float("inf"), 0.05)
    assert not is_admitted(0.1, 0.2, 0.05) and not is_admitted(0.0, 0.001, 0.05)
    assert is_admitted(0.0, 0.2, 0.0), "some node has room"


def test_a_report_that_cannot_be_read_counts_room_and_keeps_the_rest_dear() -> None:
    for text in ("", "AAAA", "no base64!"):
        report = Pressure.from_text(text, 10, 100)
        assert (report.price(10), report.free_bytes, report.bytes_by_value[BINS - 1]) == (0.0, 10, 90)
    report = pressure(5, (0.3, 7))
    assert Pressure.from_text(report.to_text(), 0, 0) == report


@pytest.mark.parametrize(("apart_s", "reports"), [(0.01, 2), (0.3, 10), (5.0, 40)])
def test_replayed_reports_are_no_older_than_live_ones(apart_s: float, reports: int, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    report = cluster_replay._Cluster.report
    monkeypatch.setattr(cluster_replay._Cluster, "report", lambda self, now: made.append(now) or report(self, now))
    replay_cluster(Trace.of("x", [(apart_s * i, 512, (i,)) for i in range(40)]), "value", 4, 2)
    assert len(made) == reports
