"""`top` and `console` against a real system's store and against pages that fail."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import pytest
from prometheus_client import start_http_server

from kvstore.clock import ManualClock
from kvstore.errors import TransportError
from kvstore.metadata import NodeRecord, WorkerRecord
from kvstore.metrics import Metrics
from services.console.server import ConsoleServer
from services.console.watch import Watch, hit_rate


@pytest.fixture
def cluster():
    """One node and one worker whose pages are real, and a node whose page does not answer."""
    metrics = Metrics()
    server, thread = start_http_server(0, "127.0.0.1", metrics.registry)
    page = f"127.0.0.1:{server.server_port}"
    nodes = [NodeRecord("n0", "0" * 16, "h:1", page, arena_bytes=100), NodeRecord("n1", "1" * 16, "h:2", "127.0.0.1:1", arena_bytes=100)]
    workers = [WorkerRecord("w0", "h:3", metrics=page)]
    yield metrics, lambda redis: (nodes, workers)
    server.shutdown()
    thread.join()
    server.server_close()


def test_figures_are_sums_over_labels_and_rates_are_against_the_last_sample(cluster):
    metrics, who = cluster
    clock = ManualClock()
    watch = Watch("", clock, who)
    metrics.arena_bytes.labels("n0", "used").set(60)
    metrics.arena_bytes.labels("n0", "free").set(40)
    metrics.evictions.labels("n0", "lru", "pressure").inc(5)
    metrics.lookup_tokens.labels("hit").inc(30)
    metrics.lookup_tokens.labels("miss").inc(10)
    first = watch.sample()
    node, silent = first["nodes"]
    assert (node["used_bytes"], node["free_bytes"], node["evictions"], node["evictions_per_s"]) == (60, 40, 5, None)
    assert silent["used_bytes"] is None and silent["arena_bytes"] == 100
    assert hit_rate(first["workers"]) == 0.75

    metrics.evictions.labels("n0", "lru", "pressure").inc(2)
    metrics.evictions.labels("n0", "lru", "clear").inc(4)
    clock.advance(2)
    second = watch.sample()
    assert second["seconds"] == 2 and second["nodes"][0]["evictions_per_s"] == 3


def test_a_restart_gives_no_negative_rate(cluster):
    metrics, who = cluster
    clock = ManualClock()
    watch = Watch("", clock, who)
    metrics.demotions.labels("n0", "3", "2").inc(9)
    watch.sample()
    metrics.demotions.clear()
    metrics.demotions.labels("n0", "3", "2").inc(1)
    clock.advance(1)
    assert watch.sample()["nodes"][0]["demotions_per_s"] is None


def serve(watch: Watch):
    server = ConsoleServer(("127.0.0.1", 0), "here", watch, ManualClock())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def test_the_page_and_its_sample(cluster):
    server, url = serve(Watch("", ManualClock(), cluster[1]))
    with server, urllib.request.urlopen(url) as page, urllib.request.urlopen(f"{url}/sample") as sample:
        assert b"<title>Concertina</title>" in page.read() and "default-src 'none'" in page.headers["Content-Security-Policy"]
        found = json.load(sample)
        assert found["name"] == "here" and [node["id"] for node in found["nodes"]] == ["n0", "n1"]
        with pytest.raises(urllib.error.HTTPError) as missing:
            urllib.request.urlopen(f"{url}/elsewhere")
        assert missing.value.code == 404
        server.shutdown()


def test_many_browsers_ask_the_cluster_once(cluster):
    calls = []

    def who(redis):
        calls.append(redis)
        return cluster[1](redis)

    server, url = serve(Watch("", ManualClock(), who))
    with server:
        for _ in range(3):
            urllib.request.urlopen(f"{url}/sample").close()
        server.shutdown()
    assert len(calls) == 1


def test_a_cluster_that_is_away_is_said_not_hidden():
    def who(redis):
        raise TransportError("Redis does not answer")

    server, url = serve(Watch("", ManualClock(), who))
    with server, pytest.raises(urllib.error.HTTPError) as away:
        urllib.request.urlopen(f"{url}/sample")
    assert away.value.code == 502 and json.load(away.value)["error"] == "Redis does not answer"
    server.shutdown()
