"""Identity: no two different field sets may collide, and keys chain."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.errors import InvalidInputError
from kvstore.identity import DIGEST_BYTES, NO_PARENT, NamespaceFields, block_key, block_keys, digest, namespace

BASE = NamespaceFields(model="m", dtype="bfloat16", layers=2, kv_heads=1, head_dim=64, rope="r")


def test_every_field_changes_the_namespace():
    other = {"model": "n", "dtype": "float32", "layers": 3, "kv_heads": 2, "head_dim": 32, "rope": "s", "adapter": "a",
             "tensor_parallel_rank": 1, "tensor_parallel_size": 2, "block_tokens": 128, "tenant": "t"}  # fmt: skip
    digests = {namespace(BASE)} | {namespace(replace(BASE, **{name: value})) for name, value in other.items()}
    assert len(digests) == len(other) + 1
    assert set(other) == set(NamespaceFields.__dataclass_fields__)


def test_adapter_is_never_taken_for_tenant():
    assert namespace(replace(BASE, adapter="x", tenant="")) != namespace(replace(BASE, adapter="", tenant="x"))


@given(st.lists(st.binary(max_size=6), max_size=5), st.lists(st.binary(max_size=6), max_size=5))
def test_digest_separates_its_parts(a, b):
    assert (digest(*a) == digest(*b)) == (a == b)


@given(st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(0, 99), max_size=4),
       st.dictionaries(st.text(max_size=4), st.text(max_size=4) | st.integers(0, 99), max_size=4))  # fmt: skip
def test_namespace_is_injective(a, b):
    assert (namespace(a) == namespace(b)) == (a == b)


def test_text_and_number_differ():
    assert namespace({"a": 1}) != namespace({"a": "1"})


def test_a_field_of_another_type_is_refused():
    with pytest.raises(InvalidInputError, match="tenant"):
        namespace({"tenant": None})


def test_keys_chain_and_skip_the_tail():
    ns = namespace(BASE)
    tokens = list(range(200))
    keys = block_keys(ns, tokens, 64)
    assert len(keys) == 3 and all(len(k) == DIGEST_BYTES for k in keys)
    assert keys[0] == block_key(ns, NO_PARENT, tokens[:64])
    assert keys[1] == block_key(ns, keys[0], np.arange(64, 128))
    changed = block_keys(ns, [7, *tokens[1:]], 64)
    assert not set(keys) & set(changed), "a change in the first block must change every later key"
    assert block_keys(namespace(replace(BASE, tenant="other")), tokens, 64)[0] != keys[0]
    assert block_keys(ns, tokens[:63], 64) == []
