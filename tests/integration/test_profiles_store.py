"""Profiles through real store nodes and a real Valkey: shared, pinned, fetched, lost and shared again; workers that switch on the run."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

import pytest
import torch

from kvstore.client import ClientConfig, KvClient
from kvstore.codecs import CODECS, PROFILE_WIRE_ID
from kvstore.identity import NO_PARENT
from kvstore.layout import KVLayout
from kvstore.metadata.embedded import start_valkey
from kvstore.node import NodeConfig, StoreNode
from kvstore.node.exposition import NodeMetrics
from services.engine.base import CacheMode
from services.engine.config import EngineConfig
from services.engine.transformers_engine import TransformersEngine
from services.profiles import chunks, claim, local
from services.profiles.keeper import ProfileKeeper, Wanted
from services.profiles.shared import SharedProfiles
from tests.engine_support import MemoryStore, answer, make_model, prompt, published, running, spec
from tests.profile_support import copying, fitted_profile, profile_of, until

LAYOUT = KVLayout(2, 2, 8, torch.float32)
MODEL = "ab" * 32
CODEC = {number: name for name, (number, _) in CODECS.items()}


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Many small chunks, no long waits, and a cache directory of the test's own."""
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 4000)
    monkeypatch.setattr(claim, "SETTLE_S", 0.05)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model("llama", tmp_path_factory.mktemp("llama"))


class Cluster:
    """Two nodes in this process on a Valkey of their own."""

    def __init__(self, stack: AsyncExitStack, url: str, nodes: list[StoreNode]) -> None:
        self._stack, self.url, self.nodes = stack, url, nodes

    async def client(self) -> KvClient:
        client = KvClient(ClientConfig(redis_url=self.url))
        await client.start()
        self._stack.push_async_callback(client.close)
        return client

    def blocks(self, *codecs: int) -> list:
        """Headers of resident blocks with these codec numbers."""
        return [e.header for node in self.nodes for e in node.engine.table if e.header.codec in codecs]

    @asynccontextmanager
    async def worker(self, path, codec="transform", command=None, profile=None, keeper=True, **options):
        """An engine and its keeper, as a worker has them."""
        config = {"dtype": "float32", "threads": 1, "block_tokens": 16, "store_floor_s": 5.0, "always_fetch": True}
        engine = TransformersEngine(EngineConfig(str(path), codec="int8" if codec == "transform" else codec, **config), self.config)
        await engine.start()
        wanted = Wanted(str(path), codec, options, profile)
        kept = ProfileKeeper(engine, wanted, KvClient(self.config), poll_s=0.1, **({"command": command} if command else {}))
        try:
            if keeper:
                await kept.start()
            yield engine
        finally:
            await kept.stop()
            await engine.stop()

    @property
    def config(self) -> ClientConfig:
        return ClientConfig(redis_url=self.url)


@asynccontextmanager
async def cluster(tmp_path, arena: int = 8 << 20):
    server = start_valkey(tmp_path / "valkey")
    async with AsyncExitStack() as stack:
        stack.callback(server.stop)
        nodes = []
        for i in range(2):
            node = StoreNode(NodeConfig(redis=server.url, arena=arena, id=f"node-{i}", drain_s=0.2))
            await node.start()
            stack.push_async_callback(node.stop)
            nodes.append(node)
        yield Cluster(stack, server.url, nodes)


async def fetched(shared: SharedProfiles, name: str):
    note = await shared.note(name)
    return note and await shared.get(note)


async def test_a_shared_profile_is_pinned_and_found_by_others(tmp_path):
    profile = profile_of(LAYOUT, MODEL)
    async with cluster(tmp_path) as store:
        shared, other = SharedProfiles(await store.client()), SharedProfiles(await store.client())
        assert await other.note("m") is None
        assert await shared.share(profile, ("m",))
        held = store.blocks(PROFILE_WIRE_ID)
        assert len(held) == -(-len(profile.to_bytes()) // 4000) > 3
        assert sum(len(node.engine.holds.pins) for node in store.nodes) == len(held)
        assert (await fetched(other, "m")).digest == (await fetched(other, profile.digest.hex())).digest == profile.digest
        assert await other.share(profile, ("m",)) and len(store.blocks(PROFILE_WIRE_ID)) == len(held)
        for node in store.nodes:
            metrics = NodeMetrics(node.metrics, node.engine, "n")
            metrics.refresh()
        stored = [s for node in store.nodes for m in [node.metrics.stored_bytes] for f in m.collect() for s in f.samples]
        assert {s.labels["codec"] for s in stored} == {"profile"}


async def test_what_the_nodes_lost_is_a_miss_until_it_is_shared_again(tmp_path):
    profile = profile_of(LAYOUT, MODEL)
    async with cluster(tmp_path) as store:
        client = await store.client()
        shared = SharedProfiles(client)
        assert await shared.share(profile, ("m",))
        assert (await fetched(shared, "m")).digest == profile.digest
        lost = [h.key for h in store.blocks(PROFILE_WIRE_ID)[:3]]
        await client.admin.unpin(lost)
        assert await client.admin.evict(lost) == ["OK"] * 3
        assert await fetched(shared, "m") is None
        assert await shared.share(profile, ("m",))
        assert (await fetched(shared, "m")).digest == profile.digest


async def test_a_profile_that_does_not_fit_is_not_shared(tmp_path):
    async with cluster(tmp_path, arena=16 << 10) as store:
        shared = SharedProfiles(await store.client())
        assert not await shared.share(profile_of(LAYOUT, MODEL), ("m",))
        assert await shared.note("m") is None and not store.blocks(PROFILE_WIRE_ID)


async def test_a_damaged_note_and_a_wrong_digest_are_misses(tmp_path):
    profile = profile_of(LAYOUT, MODEL)
    async with cluster(tmp_path) as store:
        client = await store.client()
        shared = SharedProfiles(client)
        assert await shared.share(profile, ("m",))
        assert (await fetched(shared, "m")).digest == profile.digest
        assert await shared.get(replace(await shared.note("m"), digest="0" * 64)) is None
        await client.metadata.set_value("profile:m", b"[]")
        assert await shared.note("m") is None


async def test_without_redis_there_is_no_profile_and_no_error(tmp_path):
    client = KvClient(ClientConfig(redis_url="redis://127.0.0.1:1/0", redis_timeout_s=0.2))
    await client.start()
    shared = SharedProfiles(client)
    assert await shared.note("m") is None and not await shared.share(profile_of(LAYOUT, MODEL), ("m",))
    await client.close()


async def warm(engine, tokens, cached: int, **options):
    """The last delta of a request that reads only, once the nodes have announced `cached` tokens of its prompt."""
    async with asyncio.timeout(15):
        while True:
            _, last = await answer(engine, spec(tokens, 1, cache_mode=CacheMode.READ_ONLY, **options))
            if last.cache.cached_tokens == cached:
                return last
            await asyncio.sleep(0.05)


def unreadable(engine) -> float:
    return engine.metrics.unreadable_blocks.labels(reason="profile")._value.get()


async def engine_profile(engine, seed: int = 0):
    return profile_of(engine.info.layout, engine.info.fingerprint, seed)


async def test_new_blocks_switch_from_int8_to_transform_when_the_profile_is_made(tmp_path, model):
    runs, source = tmp_path / "runs", tmp_path / "made"
    async with cluster(tmp_path) as store:
        gate = tmp_path / "gate"
        slow = copying(source, runs)

        def command(model_dir, out):
            python, flag, program, *rest = slow(model_dir, out)
            wait = f"import os, time\nwhile not os.path.exists({str(gate)!r}): time.sleep(0.02)\n"
            return [python, flag, wait + program, *rest]

        async with store.worker(model, command=command, ratio=2.0) as engine:
            assert engine.info.codec == "int8"
            (await engine_profile(engine)).save(source)
            await answer(engine, spec(prompt(40), 2))
            await until(lambda: len(store.blocks(*CODEC)) == 2)
            assert {h.codec for h in store.blocks(*CODEC)} == {CODECS["int8"][0]}
            gate.touch()
            await until(lambda: engine.info.codec == "transform")
            await answer(engine, spec(prompt(40, seed=1), 2))
            await until(lambda: len(store.blocks(CODECS["transform"][0])) == 2)
            digest = (await engine_profile(engine)).digest
            assert {h.profile for h in store.blocks(CODECS["transform"][0])} == {digest}
            await until(lambda: store.blocks(PROFILE_WIRE_ID))
            assert (await warm(engine, prompt(40), 32)).cache.fidelity == 1  # int8 is read as before
            assert local.find(engine.info.fingerprint, engine.info.layout).digest == digest
        # Another worker finds the file at its start, and calibrates nothing.
        async with store.worker(model, command=copying(source, runs)) as engine:
            assert engine.info.codec == "transform"
    assert runs.read_text() == "run\n"


async def test_one_worker_calibrates_and_the_others_fetch(tmp_path, model, monkeypatch):
    runs, source = tmp_path / "runs", tmp_path / "made"
    monkeypatch.setattr(local, "find", lambda *_: None)  # as if each were a machine of its own
    async with cluster(tmp_path) as store, AsyncExitStack() as stack:
        async with store.worker(model, codec="int8") as engine:
            (await engine_profile(engine)).save(source)
        workers = [await stack.enter_async_context(store.worker(model, command=copying(source, runs))) for _ in range(3)]
        await until(lambda: all(engine.info.codec == "transform" for engine in workers))
        await answer(workers[0], spec(prompt(40), 1))
        await until(lambda: len(store.blocks(CODECS["transform"][0])) == 2)
        assert (await warm(workers[1], prompt(40), 32)).cache.fidelity == 3
    assert runs.read_text() == "run\n"


async def test_a_worker_that_may_calibrate_just_after_another_has_does_not(tmp_path, model, monkeypatch):
    runs, source, made, late = tmp_path / "runs", tmp_path / "made", asyncio.Event(), []
    monkeypatch.setattr(local, "find", lambda *_: None)
    take, release = claim.Claim.take, claim.Claim.release

    async def take_late(self):
        """The second worker has looked, and found nothing, when the first one calibrates."""
        late.append(self)
        if len(late) == 1:
            await made.wait()
        return await take(self)

    async def release_and_tell(self):
        await release(self)
        made.set()

    monkeypatch.setattr(claim.Claim, "take", take_late)
    monkeypatch.setattr(claim.Claim, "release", release_and_tell)
    async with cluster(tmp_path) as store, store.worker(model, command=copying(source, runs)) as second:
        await until(lambda: late)
        (await engine_profile(second)).save(source)
        async with store.worker(model, command=copying(source, runs)) as first:
            await until(lambda: first.info.codec == second.info.codec == "transform")
    assert runs.read_text() == "run\n"


async def test_a_calibration_that_fails_leaves_int8_and_others_may_try(tmp_path, model):
    runs, source = tmp_path / "runs", tmp_path / "made"
    async with cluster(tmp_path) as store, store.worker(model, command=copying(tmp_path / "missing", runs)) as engine:
        await until(runs.exists)
        await asyncio.sleep(1)
        assert engine.info.codec == "int8" and runs.read_text() == "run\n"
        (await engine_profile(engine)).save(source)
        async with store.worker(model, command=copying(source, runs)) as second:
            await until(lambda: second.info.codec == engine.info.codec == "transform")
    assert runs.read_text() == "run\nrun\n"


async def test_a_given_profile_is_used_at_once_and_readers_find_it_by_its_digest(tmp_path, model):
    async with cluster(tmp_path) as store, store.worker(model, codec="int8") as reader:
        given = await engine_profile(reader, seed=1)
        async with store.worker(model, profile=given, ratio=2.0) as writer:
            assert writer.info.codec == "transform"
            await answer(writer, spec(prompt(40), 1))
            await until(lambda: len(store.blocks(CODECS["transform"][0])) == 2 and store.blocks(PROFILE_WIRE_ID))
            assert await SharedProfiles(await store.client()).note(local.name_of(reader.info.fingerprint, reader.info.layout)) is None
            await warm(reader, prompt(40), 32)
            assert unreadable(reader) >= 1 and reader.info.codec == "int8"


async def test_codecs_and_unknown_profiles_mix_in_one_prefix(tmp_path, model):
    async with cluster(tmp_path) as store:
        tokens = prompt(130)
        async with store.worker(model, keeper=False) as engine:
            known, unknown = await engine_profile(engine), await engine_profile(engine, seed=1)
            await answer(engine, spec(tokens[:33], 1))
            await until(lambda: len(store.blocks(*CODEC)) == 2)
            for number, profile in ((5, known), (8, unknown)):
                await engine.use_profile(profile, "transform", {"ratio": 2.0}, write=True)
                await answer(engine, spec(tokens[: 16 * number + 1], 1))
                await until(lambda number=number: len(store.blocks(*CODEC)) == number)
        headers = sorted(store.blocks(*CODEC), key=lambda h: h.start)
        assert [(CODEC[h.codec], h.profile) for h in headers] == (
            [("int8", NO_PARENT)] * 2 + [("transform", known.digest)] * 3 + [("transform", unknown.digest)] * 3
        )
        async with store.worker(model, keeper=False) as reader:
            await reader.use_profile(known, "transform", {}, write=False)
            last = await warm(reader, tokens, 80)
            assert unreadable(reader) >= 1 and reader.info.codec == "int8"
            worst = max(d for h in headers[:5] for d in (h.rows[-1].distortion.keys, h.rows[-1].distortion.values))
            assert last.cache.distortion == pytest.approx(worst)
            best = max(headers[0].rows[0].distortion.keys, headers[0].rows[0].distortion.values)
            assert (await warm(reader, tokens, 32, max_distortion=2 * best)).cache.distortion < worst


async def test_truncated_blocks_are_held_against_the_distortion_that_is_asked_for(tmp_path, model):
    store = MemoryStore()
    async with running(model, store) as engine:
        profile = fitted_profile(model, engine.info.layout, engine.info.fingerprint)
        await engine.use_profile(profile, "transform", {"ratio": 1.5, "layers": (4, 2.5, 1.5)}, write=True)
        await answer(engine, spec(prompt(50), 1))
        await published(engine, store, 3)
        full = [max(b.distortion[3].keys, b.distortion[3].values) for b in store.blocks()]
        last = await warm(engine, prompt(50), 48)
        assert last.cache.fidelity == 3 and last.cache.distortion == pytest.approx(max(full))
        for address, stored in store.stored.items():  # as a node under pressure does
            for block in store.blocks(address):
                if block.header.start == 16:
                    short = block.truncate(1)
                    stored[block.header.key] = short.to_bytes()
        coarse = max(short.distortion[1].keys, short.distortion[1].values)
        assert coarse > 1.5 * max(full)
        last = await warm(engine, prompt(50), 48)
        assert last.cache.fidelity == 1 and last.cache.distortion == pytest.approx(coarse)
        last = await warm(engine, prompt(50), 16, max_distortion=(coarse + max(full)) / 2)
        assert last.cache.fidelity == 3 and last.cache.distortion == pytest.approx(full[0])
