"""Damaged blocks are refused or decode to something, and never do anything else. Longer runs: ``python -m tests.codec_fuzz``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.block import EncodedBlock
from kvstore.codecs import create
from kvstore.errors import CorruptBlockError
from tests.codec_fuzz import LAYOUT, TOKENS, fuzz
from tests.codec_support import make_tensors


def test_a_thousand_damaged_blocks_of_every_codec():
    report = fuzz(seed=20, cases=1400)
    assert not report.failures
    refused = sum(n for outcome, n in report.outcomes.items() if outcome.endswith("refused"))
    assert report.cases == 1400 and refused > 700, "broken checksums alone are half of the cases"


@given(st.binary(max_size=600))
def test_any_bytes_are_a_block_or_corrupt(data):
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(data)
    with pytest.raises(CorruptBlockError):
        EncodedBlock.from_bytes(b"KVCB\x01\x00" + data)


@given(st.data())
def test_a_flipped_bit_or_a_cut_is_always_found(data):
    keys, values, _ = make_tensors(LAYOUT, TOKENS)
    blob = bytearray(create("int8", LAYOUT).encode(keys, values, start=0).to_bytes())
    at = data.draw(st.integers(0, len(blob) - 1))
    cut = blob[:at]
    blob[at] ^= 1 << data.draw(st.integers(0, 7))
    for wrong in (blob, cut):
        with pytest.raises(CorruptBlockError):
            EncodedBlock.from_bytes(wrong)
