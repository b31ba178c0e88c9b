"""Shapes are found once a machine, model and library, and what is damaged is found anew."""

import pytest

from services.engine.remembered import machine, remembered_shapes
from services.engine.runner import Shapes

FOUND = (Shapes((1, 2, 4), 2, 8, 256), 345.5)


@pytest.fixture
def finder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    calls = []

    def find():
        calls.append(1)
        return FOUND

    find.calls = calls
    return find


def test_the_second_start_is_spared(finder):
    assert remembered_shapes({"a": "1"}, finder) == (*FOUND, False)
    assert remembered_shapes({"a": "1"}, finder) == (*FOUND, True)
    assert len(finder.calls) == 1


def test_any_other_fact_is_found_anew(finder):
    remembered_shapes({"a": "1", "b": "2"}, finder)
    for facts in ({"a": "1"}, {"a": "12", "b": ""}, {"a": "1", "b": "3"}):
        assert not remembered_shapes(facts, finder)[2]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"tiles": [1]}', '{"tiles": [2], "quantum": 1, "rows": 1, "prefill_tokens_per_s": 1}',
                                  '{"tiles": [1], "quantum": 0, "rows": 1, "prefill_tokens_per_s": 1}',
                                  '{"tiles": [1], "quantum": 1, "rows": 1, "prefill": -1, "prefill_tokens_per_s": 1}'])  # fmt: skip
def test_a_damaged_file_is_made_anew(finder, tmp_path, text):
    remembered_shapes({}, finder)
    (file,) = (tmp_path / "concertina" / "shapes").glob("*.json")
    file.write_text(text)
    assert remembered_shapes({}, finder) == (*FOUND, False)
    assert remembered_shapes({}, finder) == (*FOUND, True)


def test_a_cache_that_cannot_be_written_costs_nothing_else(finder, tmp_path):
    (tmp_path / "concertina").write_text("in the way")
    assert remembered_shapes({}, finder) == (*FOUND, False)


def test_the_machine_is_described():
    facts = machine("cpu")
    assert facts["device"] == "cpu" and facts["torch"] and int(facts["threads"]) > 0
    assert facts == machine("cpu")
