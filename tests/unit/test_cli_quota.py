"""``concertina blocks quota|floor`` and the policies that a system refuses."""

from __future__ import annotations

import pytest

from kvstore.node.config import NodeConfig
from services.cli import main


@pytest.mark.parametrize("arguments", [["alice"], ["--size", "1GiB"], ["alice", "bob", "--size", "1GiB"]])
def test_a_quota_needs_one_subject_and_its_size(arguments: list[str]) -> None:
    assert main(["blocks", "quota", *arguments, "--redis", "redis://127.0.0.1:1/0"]) == 2


@pytest.mark.parametrize("arguments", [["alice"], ["--max-distortion", "0.1"], ["alice", "--size", "1GiB"]])
def test_a_floor_needs_one_subject_and_its_distortion(arguments: list[str]) -> None:
    assert main(["blocks", "floor", *arguments, "--redis", "redis://127.0.0.1:1/0"]) == 2


def test_up_refuses_a_policy_that_sees_the_future(capsys: pytest.CaptureFixture) -> None:
    assert main(["up", "--policy", "opt", "--workers", "0"]) == 2
    assert "sees the future" in capsys.readouterr().err


def test_a_node_refuses_it_too(capsys: pytest.CaptureFixture) -> None:
    assert main(["node", "--policy", "opt", "--arena", "1MiB"]) == 2
    assert "sees the future" in capsys.readouterr().err
    assert NodeConfig().policy == "value"
