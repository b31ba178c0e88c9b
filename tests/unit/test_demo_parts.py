"""The demo's texts and how it tells of what it saw."""

from __future__ import annotations

import io
import json

from rich.console import Console

from services.demo.client import Answer
from services.demo.documents import document, question
from services.demo.story import Row
from services.demo.tell import as_json, tell

ANSWER = Answer("text", (1, 2), prompt_tokens=100, cached_tokens=64, bytes_fetched=1000, raw_bytes=2000, ttft_ms=12.3)


def test_documents_have_the_length_asked_for_and_share_no_beginning():
    texts = [document(number, 1500) for number in range(18)]
    assert all(5500 < len(text) < 6200 for text in texts)
    assert len({text.split("\n\n", 1)[1][:200] for text in texts}) == len(texts)
    assert texts == [document(number, 1500) for number in range(18)]


def test_two_questions_share_the_document_as_their_prefix():
    text = document(0, 400)
    assert question(text, "One?").startswith(text) and question(text, "Two?").startswith(text)


def test_the_ratio_is_of_what_was_fetched():
    assert ANSWER.ratio == 2.0
    assert Answer("", (), 10, 0, 0, 0, 1.0).ratio == 0.0


def test_the_table_names_what_was_not_kept_and_ends_with_how_to_call_it():
    out = io.StringIO()
    tell(Console(file=out, width=150), [Row("warm", "sooner", True, ANSWER), Row("evicted", "nothing", False)], 61.4)
    text = out.getvalue()
    assert "12 ms" in text and "2.0×" in text and "1 of 2 promises kept in 61 s. Not kept: evicted." in text
    assert "concertina generate" in text.strip().splitlines()[-1]


def test_scenes_are_plain_json():
    rows = json.loads(json.dumps(as_json([Row("warm", "sooner", True, ANSWER), Row("evicted", "nothing", False)])))
    assert rows[0]["cached_tokens"] == 64 and rows[0]["ratio"] == 2.0 and rows[1]["ttft_ms"] is None
