"""The trace reader, the semantics of the replay on traces small enough to count by hand, and the command's contract."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from kvstore.errors import ConfigError, InvalidInputError
from kvstore.eviction import create
from kvstore.eviction.cluster_replay import Skew, replay_cluster
from kvstore.eviction.replay import Ladder, replay
from kvstore.eviction.trace import read_trace
from services.cli import main
from services.cli.replay import parse_capacity

DATA = Path(__file__).parent.parent / "data"


def write(path: Path, *requests: tuple[int, int, list[int]]) -> Path:
    lines = [json.dumps({"timestamp": t, "input_length": n, "output_length": 1, "hash_ids": ids}) for t, n, ids in requests]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_hits_by_hand(tmp_path: Path) -> None:
    """Three blocks fit: request 3 finds 1 and 2 but not 3, whose place 7 took; the last block counts its own tokens only."""
    again = [1, 2, 3]
    trace = read_trace(write(tmp_path / "t.jsonl", (0, 1300, again), (1000, 100, [7]), (2000, 1300, again), (3000, 1300, again)))
    outcome = replay(trace, create("lru"), 3)
    assert outcome.hit_tokens == 0 + 0 + 1024 + 1300
    assert outcome.tokens == 4000
    assert outcome.evictions == 2


def test_the_requests_own_blocks_may_go(tmp_path: Path) -> None:
    trace = read_trace(write(tmp_path / "t.jsonl", (0, 2048, [1, 2, 3, 4]), (1, 2048, [1, 2, 3, 4])))
    assert replay(trace, create("lru"), 1).hit_tokens == 512


def test_quality_by_hand(tmp_path: Path) -> None:
    """Four half-size blocks in the room of two: all hit, all at the second rung."""
    trace = read_trace(write(tmp_path / "t.jsonl", (0, 2048, [1, 2, 3, 4]), (1, 2000, [1, 2, 3, 4])))
    outcome = replay(trace, create("lru"), 2, Ladder.parse("1,0.5", "1,0.75"))
    assert (outcome.hit_tokens, outcome.quality_tokens, outcome.demotions, outcome.evictions) == (2000, 1500.0, 4, 0)


@pytest.mark.parametrize(
    "line",
    [
        "not json",
        "[]",
        '{"timestamp": 0, "input_length": 5}',
        '{"timestamp": 0, "input_length": -1, "hash_ids": []}',
        '{"timestamp": "x", "input_length": 1, "hash_ids": []}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [1.5]}',
        '{"timestamp": 0, "input_length": 1, "hash_ids": [9, 1]}',
        '{"timestamp": NaN, "input_length": 1, "hash_ids": [1]}',
        "[" * 100_000,
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "t.jsonl", (0, 512, [1]))
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(InvalidInputError, match="line 3"):
        read_trace(path)


def test_unreadable_traces(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"timestamp": 0}\n' * 1000)[:-20])
    with pytest.raises(InvalidInputError):
        read_trace(tmp_path / "cut.jsonl.gz")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidInputError, match="no request"):
        read_trace(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("rungs", "quality"),
    [("0.5", None), ("1,1", None), ("1,2", None), ("1,0", None), ("a", None), ("1,0.5", "1"), ("1,0.5", "1,1.1"), ("1,1/0", None)],
)
def test_impossible_ladders(rungs: str, quality: str | None) -> None:
    with pytest.raises(ConfigError):
        Ladder.parse(rungs, quality)


def test_capacity_is_a_share_or_a_number() -> None:
    trace = read_trace(DATA / "agentic_150.jsonl.gz")
    assert parse_capacity("5%", trace) == parse_capacity("0.05", trace) == round(0.05 * trace.distinct_blocks)
    assert parse_capacity("0.00001%", trace) == 1
    assert parse_capacity("70", trace) == 70
    for wrong in ("", "x%", "0", "-3", "nan%", "inf%"):
        with pytest.raises(ConfigError):
            parse_capacity(wrong, trace)


def test_json_contract(capsys: pytest.CaptureFixture[str]) -> None:
    path = str(DATA / "agentic_150.jsonl.gz")
    assert main(["replay", path, "--policy", "value", "--capacity", "5%", "--ladder", "1,0.5,0.25", "--quality", "1,.98,.9", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert {"trace", "policy", "capacity_blocks", "requests", "tokens", "hit_tokens", "seconds"} <= set(out)
    assert out["token_hit_rate"] == out["hit_tokens"] / out["tokens"] > out["quality_weighted_hit_rate"] > 0
    assert "nodes" not in out
    assert main(["replay", path, "--nodes", "3", "--skew", "60,30,10", "--stale", "5", "--json"]) == 0
    nodes = json.loads(capsys.readouterr().out)["nodes"]
    assert len(nodes) == 3
    assert all(node["used_blocks"] <= node["capacity_blocks"] for node in nodes)
    assert main(["replay", str(DATA / "none.jsonl"), "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"]["reason"] == "INVALID_INPUT"


def test_compare_prints_a_row_a_policy_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "hits.svg"
    assert main(["replay", str(DATA / "agentic_150.jsonl.gz"), "--limit", "60", "--compare", "--plot", str(plot)]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[1:]] == ["lru", "fifo", "s3fifo", "gdsf", "value", "opt"]
    assert plot.read_text().startswith("<svg")


def test_one_node_is_the_single_store() -> None:
    trace = read_trace(DATA / "conversation_400.jsonl.gz")
    assert replay_cluster(trace, "value", 500, 1).hit_tokens == replay(trace, create("value"), 500).hit_tokens


@pytest.mark.parametrize(("text", "nodes"), [("1,2", 3), ("a,b", 2), ("0,0", 2), ("1,-1", 2), (None, 0)])
def test_impossible_clusters(text: str | None, nodes: int) -> None:
    with pytest.raises(ConfigError):
        Skew.parse(text, nodes)
