"""``concertina bench store``: every way really moves the bytes, and the result says what was compared."""

from __future__ import annotations

import json

from services.bench.stores import STORES
from services.bench.stores.base import NAMESPACE, Values
from services.cli import main


def test_values_are_a_chain_of_blocks_that_no_other_client_has():
    values, others = Values(3, 1000), Values(3, 1000, client=1)
    headers = [block.header for block in values.blocks]
    assert [h.key for h in headers] == values.keys and {h.namespace for h in headers} == {NAMESPACE}
    assert [h.parent for h in headers[1:]] == values.keys[:-1]
    assert not set(values.keys) & set(others.keys)
    assert all(bytes(block.payload[0]) == bytes(value) for block, value in zip(values.blocks, values.data, strict=True))


def test_quick_run_of_values_and_lookups(capsys):
    arguments = ["--quick", "--sizes", "64KiB", "--values", "4", "--clients", "1", "--rounds", "2", "--index", "4000", "--json"]
    assert main(["bench", "store", "--only", "values", *arguments]) == 0
    moved = json.loads(capsys.readouterr().out)
    stores = {row["store"] for row in moved["rows"]}
    assert stores == {"memory", "plain_tcp", "redis", "grpc", "tcp", "same_host"} <= set(STORES)
    assert all(row["gb_per_s"] > 0 for row in moved["rows"]) and len(moved["rows"]) == 12
    assert len(moved["samples"]["1x65536.same_host.get_s"]) == 2
    assert {"1x65536.same_host.get_to_memory", "1x65536.grpc.put_to_redis"} <= set(moved["ratios"])
    assert main(["bench", "store", "--only", "lookup", *arguments]) == 0
    looked = json.loads(capsys.readouterr().out)
    assert {row["lookup_blocks"] for row in looked["rows"]} == {10, 16, 100, 2000}
    assert all(0 < row["p50_ms"] <= row["p99_ms"] for row in looked["rows"])


def test_peers_that_are_not_installed_are_named(capsys):
    assert main(["bench", "peers", "--quick", "--sizes", "64KiB", "--values", "2", "--rounds", "1", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    present = {row["store"] for row in result["rows"]}
    for name in ("lmcache", "mooncake"):
        assert (name in present) != (name in result["configuration"]["left_out"])
