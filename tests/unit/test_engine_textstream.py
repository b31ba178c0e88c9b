"""Text as it grows: whole characters only, nothing of a stop string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.engine.textstream import TextStream, overlap
from tests.engine_support import tokenizer

TOKENIZER = tokenizer()


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream, out = TextStream(TOKENIZER, stop), []
    for token in TOKENIZER.encode(text, add_special_tokens=False):
        out.append(stream.push(token))
        if stream.stopped:
            break
    out.append(stream.finish())
    return out, stream


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_pieces_join_to_the_text_and_hold_no_half_characters(text):
    out, _ = pieces(text)
    assert "".join(out) == TOKENIZER.decode(TOKENIZER.encode(text, add_special_tokens=False), skip_special_tokens=True)
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in out)


def test_a_character_of_four_bytes_comes_with_its_last():
    assert pieces("a🎹b")[0] == ["a", "", "", "", "🎹", "b", ""]


def test_a_character_that_never_ends_is_told_at_the_end():
    stream = TextStream(TOKENIZER)
    first = TOKENIZER.encode("🎹", add_special_tokens=False)[0]
    assert stream.push(first) == "" and stream.finish() == "\ufffd"


def test_a_stop_string_is_cut_off_and_its_beginning_withheld():
    out, stream = pieces("one STOP two", ("STOP",))
    assert "".join(out) == "one " and stream.stopped
    out, stream = pieces("one STO", ("STOP",))
    assert out[-1] == "STO" and "".join(out) == "one STO" and not stream.stopped


@given(st.text("abc", max_size=30), st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3))
def test_the_text_ends_before_the_first_stop_string_to_be_complete(text, stop):
    out, stream = pieces(text, tuple(stop))
    complete = [n for n in range(len(text) + 1) if any(text[:n].endswith(s) for s in stop)]
    assert stream.stopped == bool(complete)
    if not complete:
        assert "".join(out) == text
    else:
        seen = text[: complete[0]]
        assert "".join(out) == seen[: min(seen.find(s) for s in stop if s in seen)]
        assert not any(s in "".join(out) for s in stop)


OVERLAPS = [("abc", "bcd", 2), ("abc", "abc", 0), ("aab", "aba", 2), ("", "x", 0), ("ab", "b", 0)]


@pytest.mark.parametrize(("text", "stop", "length"), OVERLAPS)
def test_overlap(text, stop, length):
    assert overlap(text, stop) == length
