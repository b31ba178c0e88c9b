"""Tenants, answers in parts, the metrics page and the application's arguments."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import urllib.request

import pytest
from pydantic import ValidationError

from kvstore.errors import AuthenticationError, CapacityError, ConfigError
from kvstore.metrics import Metrics
from services.engine.base import CacheReport, Delta, Timing
from services.worker import responses
from services.worker.engines import create_keeper
from services.worker.metrics_page import MetricsPage
from services.worker.options import WorkerArgs
from services.worker.tenants import Tenants


def tenants_file(tmp_path, entries) -> str:
    path = tmp_path / "tenants.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return str(path)


def test_a_token_names_its_tenant(tmp_path):
    tenants = Tenants.load(tenants_file(tmp_path, {hashlib.sha256(b"secret").hexdigest(): "team-a"}))
    assert tenants.of([("authorization", "Bearer secret")]) == "team-a"
    assert tenants.of([("x", "y"), ("authorization", "bearer secret ")]) == "team-a"


STRANGERS = [[], [("tenant", "team-a")]] + [[("authorization", v)] for v in ("secret", "Basic secret", "Bearer x", "Bearer ")]


@pytest.mark.parametrize("metadata", STRANGERS)
def test_other_callers_are_unauthenticated(tmp_path, metadata):
    tenants = Tenants.load(tenants_file(tmp_path, {hashlib.sha256(b"secret").hexdigest(): "team-a"}))
    with pytest.raises(AuthenticationError):
        tenants.of(metadata)


def test_without_a_file_all_are_one_tenant():
    assert Tenants.load(None).of([("authorization", "Bearer anything")]) == "default"


@pytest.mark.parametrize("entries", ["{", "[]", {}, {"secret": "a"}, {"f" * 64: ""}, {"f" * 64: "a b"}, {"f" * 64: 3}, {"F" * 64: "a"}])
def test_a_wrong_tenants_file_is_refused(tmp_path, entries):
    with pytest.raises(ConfigError, match="tenants"):
        Tenants.load(tenants_file(tmp_path, entries))


def test_arguments_are_checked_before_anything_starts(tmp_path):
    for wrong in ({"device": "tpu"}, {"replicas": 0}, {"ratio": 0.5}, {"surprise": 1}):
        with pytest.raises(ValidationError):
            WorkerArgs(**wrong)
    with pytest.raises(ConfigError):
        WorkerArgs(tenants=str(tmp_path / "none.json"))


def test_a_profile_for_a_codec_that_has_none_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="transform"):
        create_keeper(WorkerArgs(codec="int8", profile=str(tmp_path / "p.kvp")), None)
    with pytest.raises(ConfigError, match="concertina calibrate"):
        create_keeper(WorkerArgs(profile=str(tmp_path / "p.kvp")), None)


def delta(number: int, last: bool = False) -> Delta:
    made = Delta(f"{number} ", [number], "length" if last else "")
    if last:
        made.prompt_tokens, made.completion_tokens = 7, number + 1
        made.cache, made.timing = CacheReport(cached_tokens=4, blocks_hit=2, bytes_fetched=99), Timing(ttft_ms=1.5)
    return made


class Source:
    """Deltas one after the other; says whether it was closed."""

    def __init__(self, count: int, pause_s: float = 0.0, error: Exception | None = None) -> None:
        self.closed = False
        self._count, self._pause_s, self._error = count, pause_s, error

    async def deltas(self):
        try:
            for number in range(self._count):
                await asyncio.sleep(self._pause_s)
                yield delta(number, last=number == self._count - 1 and not self._error)
            if self._error:
                raise self._error
        finally:
            self.closed = True


async def test_parts_joined_are_the_whole():
    whole = responses.response("id", await responses.whole(Source(50).deltas()))
    parts = [responses.chunk("id", d) async for d in responses.coalesce(Source(50, 0.001).deltas())]
    assert "".join(p.text for p in parts) == whole.text
    assert [t for p in parts for t in p.tokens] == list(whole.tokens) == list(range(50))
    assert parts[-1].usage == whole.usage and parts[-1].cache == whole.cache and parts[-1].timing == whole.timing
    assert [p.finish_reason for p in parts] == [""] * (len(parts) - 1) + ["length"]
    assert whole.usage.prompt_tokens == 7 and whole.usage.cached_tokens == 4 and whole.cache.blocks_hit == 2
    assert not any(p.HasField("usage") for p in parts[:-1])


async def test_quick_tokens_travel_together():
    parts = [d async for d in responses.coalesce(Source(200).deltas(), flush_s=0.05)]
    assert len(parts) < 20


async def test_what_came_before_an_error_is_still_delivered():
    seen = []
    with pytest.raises(CapacityError):
        async for part in responses.coalesce(Source(3, error=CapacityError("full")).deltas()):
            seen += part.tokens
    assert seen == [0, 1, 2]


async def test_closing_the_stream_closes_the_engines_iterator():
    source = Source(1000, 0.001)
    stream = responses.coalesce(source.deltas())
    await anext(stream)
    await stream.aclose()
    assert source.closed


async def test_cancelling_the_reader_closes_the_engines_iterator():
    source = Source(1000, 0.01)

    async def read():
        async for _ in responses.coalesce(source.deltas()):
            pass

    reader = asyncio.create_task(read())
    await asyncio.sleep(0.05)
    reader.cancel()
    await asyncio.wait({reader})
    assert reader.cancelled() and source.closed


def test_a_second_replica_finds_a_port_of_its_own():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        listen = f"127.0.0.1:{probe.getsockname()[1]}"
    metrics = Metrics()
    metrics.requests.labels(code="OK").inc()
    first, second = MetricsPage(metrics.registry, listen), MetricsPage(Metrics().registry, listen)
    first.start()
    second.start()
    try:
        assert first.address == listen != second.address
        page = urllib.request.urlopen(f"http://{first.address}/metrics", timeout=5).read().decode()
        assert 'concertina_requests_total{code="OK"} 1.0' in page
        assert urllib.request.urlopen(f"http://{second.address}/metrics", timeout=5).status == 200
    finally:
        first.stop()
        second.stop()
