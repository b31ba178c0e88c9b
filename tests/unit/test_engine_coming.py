"""Layers that are still on their way: who waits for them, and who hears of their end."""

from __future__ import annotations

import threading

import pytest

from services.engine.coming import Coming


def test_whoever_waits_goes_on_with_each_layer_and_does_other_things_meanwhile():
    coming, passed, turns = Coming(), [], threading.Event()

    def compute() -> None:
        for layer in range(4):
            coming.wait(layer, turns.set)
            passed.append(layer)

    thread = threading.Thread(target=compute)
    thread.start()
    assert turns.wait(5)
    coming.there(2)
    turns.clear()
    assert turns.wait(5) and passed == [0, 1]
    coming.there(4)
    thread.join(5)
    assert passed == [0, 1, 2, 3]


@pytest.mark.parametrize("lost", [False, True])
def test_the_end_lets_everybody_go_on(lost):
    coming, heard = Coming(), []
    coming.whole(lambda: heard.append("whole"))
    coming.there(1)
    coming.end(lost)
    coming.wait(7)
    coming.whole(lambda: heard.append("late"))
    coming.abandon(lambda: heard.append("free"))
    assert coming.lost is lost
    assert heard == (["free"] if lost else ["whole", "late", "free"])


def test_what_is_abandoned_is_given_back_at_the_end_and_told_to_nobody():
    coming, heard = Coming(), []
    coming.whole(lambda: heard.append("whole"))
    coming.abandon(lambda: heard.append("free"))
    assert heard == []
    coming.end()
    assert heard == ["free"]
