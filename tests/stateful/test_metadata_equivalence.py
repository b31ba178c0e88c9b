"""Redis' packed index against the plain one: after any sequence of announcements and withdrawals both locate the same."""

from __future__ import annotations

import asyncio
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvstore.metadata import IndexEntry, InprocMetadata, connect
from kvstore.metadata.embedded import start_valkey

INCARNATIONS = [f"{i:016x}" for i in range(1, 8)]
#: Some share a bucket (the leading 17 bits), some even all but the last byte.
KEYS = [bytes([a]) + bytes(30) + bytes([b]) for a in (0, 7) for b in range(4)]

keys = st.lists(st.sampled_from(KEYS), max_size=8)
entries = st.lists(
    st.builds(IndexEntry, st.sampled_from(KEYS), st.integers(0, 2**32 - 1), st.integers(0, 255)), max_size=8, unique_by=lambda e: e.key
)
steps = st.lists(
    st.one_of(
        st.tuples(st.just("announce"), st.sampled_from(INCARNATIONS), entries),
        st.tuples(st.just("withdraw"), st.sampled_from(INCARNATIONS), keys),
    ),
    max_size=25,
)


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    server = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


_prefixes = (f"run{i}" for i in itertools.count())


@given(steps)
@settings(max_examples=60)
def test_both_backends_locate_the_same(valkey, sequence):
    async def replay():
        plain, packed = InprocMetadata(), connect(valkey.url, prefix=next(_prefixes), timeout_s=5)
        try:
            for action, incarnation, argument in sequence:
                for backend in (plain, packed):
                    await getattr(backend, action)(incarnation, argument)
                assert await packed.locate(KEYS) == await plain.locate(KEYS)
        finally:
            await packed.close()

    asyncio.run(replay())
