"""`up` and `down` on real parts: nothing is left, whatever happens; stores alone, since a worker adds nothing but time here."""

from __future__ import annotations

import json
import os
import signal
import urllib.request

import pytest

from tests.system_support import Cli, marked, until, valkeys

SMALL = ("--workers", "0", "--arena", "8MiB")


@pytest.fixture
def cli(tmp_path):
    cli = Cli(tmp_path)
    yield cli
    for directory in (tmp_path / "concertina").glob("*/"):
        cli.run("down", "--name", directory.name)


def assert_nothing_left(cli: Cli, name: str) -> None:
    until(lambda: not marked(f"{name}-"), what=f"the end of {name}")
    assert not valkeys(cli.state)
    assert not (cli.state / "concertina" / name).exists()


def test_two_systems_side_by_side_and_each_down_ends_its_own(cli):
    assert cli.run("up", "--name", "left", "--nodes", "2", *SMALL).returncode == 0
    assert cli.run("up", "--name", "right", "--nodes", "1", *SMALL).returncode == 0
    left, right = cli.json("status", "--name", "left"), cli.json("status", "--name", "right")
    assert len(left["nodes"]) == 2 and len(right["nodes"]) == 1 and left["redis"] != right["redis"]
    assert left["inference"] is None and left["workers"] == [] and left["name"] == "left"
    assert all(n["arena_bytes"] == 8 << 20 and n["used_bytes"] == 0 and n["metrics"] for n in left["nodes"])
    assert cli.run("up", "--name", "left", *SMALL).returncode == 2

    assert cli.run("down", "--name", "left").returncode == 0
    assert not marked("left-")
    assert len(cli.json("status", "--name", "right")["nodes"]) == 1
    assert cli.json("blocks", "ls", "--name", "right") == []
    (node,) = cli.json("top", "--name", "right", "--count", "1")["nodes"]
    assert node["used_bytes"] == 0 and node["free_bytes"] == node["arena_bytes"] == 8 << 20
    assert cli.run("down", "--name", "right").returncode == 0
    assert_nothing_left(cli, "right")


@pytest.mark.parametrize("part", ["valkey", "node"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_starts_leaves_nothing(cli, part, signum):
    up = cli.start("up", "--name", "cut", *SMALL)
    until(lambda: valkeys(cli.state) if part == "valkey" else marked("cut-"), what=f"the start of a {part}")
    up.send_signal(signum)
    assert up.wait(60) == 128 + signum
    assert_nothing_left(cli, "cut")


def test_down_ends_what_a_killed_up_left(cli):
    up = cli.start("up", "--name", "crash", *SMALL)
    until(lambda: len(marked("crash-")) >= 1, what="the start of a node")
    up.kill()
    up.wait()
    assert cli.run("down", "--name", "crash").returncode == 0
    assert_nothing_left(cli, "crash")


def test_up_clears_away_what_a_killed_up_left(cli):
    up = cli.start("up", "--name", "again", *SMALL)
    until(lambda: len(marked("again-")) >= 1, what="the start of a node")
    first = cli.marker("again")
    up.kill()
    up.wait()
    assert cli.run("up", "--name", "again", *SMALL).returncode == 0
    assert not marked(first)
    assert cli.run("down", "--name", "again").returncode == 0
    assert_nothing_left(cli, "again")


def test_a_part_that_fails_is_named_with_its_log_and_nothing_is_left(cli):
    cli.environment["CONCERTINA_NODE__HEARTBEAT_S"] = "0"
    done = cli.run("up", "--name", "fails", *SMALL)
    assert done.returncode == 2
    assert "node-" in done.stderr and "log ends" in done.stderr and "heartbeat_s" in done.stderr
    assert_nothing_left(cli, "fails")


def test_a_redis_that_does_not_answer_is_refused(cli):
    done = cli.run("up", "--name", "alone", "--redis", "redis://127.0.0.1:1/0", *SMALL)
    assert done.returncode == 1
    assert "127.0.0.1:1" in done.stderr
    assert_nothing_left(cli, "alone")


def test_the_console_is_in_the_status_as_long_as_it_is_served(cli):
    assert cli.run("up", "--name", "seen", "--nodes", "1", *SMALL).returncode == 0
    console = cli.start("console", "--name", "seen")
    until(lambda: cli.json("status", "--name", "seen")["console"], what="the console")
    with urllib.request.urlopen(cli.json("status", "--name", "seen")["console"] + "/sample", timeout=10) as reply:
        assert [node["blocks"] for node in json.load(reply)["nodes"]] == [0]
    console.send_signal(signal.SIGTERM)
    assert console.wait(20) == 0
    assert cli.json("status", "--name", "seen")["console"] is None
    assert cli.run("down", "--name", "seen").returncode == 0
    assert_nothing_left(cli, "seen")


def test_foreground_stays_until_it_is_told(cli):
    up = cli.start("up", "--name", "stay", "--foreground", *SMALL)
    until(lambda: (cli.state / "concertina/stay/system.json").exists() and cli.run("status", "--name", "stay").returncode == 0)
    until(lambda: len(cli.json("status", "--name", "stay")["nodes"]) == 2, what="two nodes")
    assert up.poll() is None
    assert cli.run("down", "--name", "stay").returncode == 0
    assert up.wait(30) != 0
    assert_nothing_left(cli, "stay")


def test_down_spares_a_process_that_took_a_recorded_pid(cli):
    assert cli.run("up", "--name", "reuse", "--nodes", "1", *SMALL).returncode == 0
    path = cli.state / "concertina/reuse/system.json"
    text = path.read_text()
    pid = next(p.pid for p in marked("reuse-"))
    path.write_text(text.replace(f'"pid": {pid},', f'"pid": {os.getpid()},'))
    assert cli.run("down", "--name", "reuse").returncode == 0
    assert_nothing_left(cli, "reuse")


def test_a_signal_while_ray_starts_leaves_nothing(cli):
    up = cli.start("up", "--name", "ray", "--nodes", "1", "--arena", "8MiB", "--codec", "int8")
    until(lambda: any("raylet" in p.name() for p in marked("ray-")), timeout_s=120, what="the start of Ray")
    up.send_signal(signal.SIGINT)
    assert up.wait(90) == 128 + signal.SIGINT
    assert_nothing_left(cli, "ray")


def test_down_after_the_worker_process_was_killed(cli):
    up = cli.start("up", "--name", "ray", "--nodes", "1", "--arena", "8MiB", "--codec", "int8")
    until(lambda: any("raylet" in p.name() for p in marked("ray-")), timeout_s=120, what="the start of Ray")
    up.kill()
    up.wait()
    next(p for p in marked("ray-") if "worker" in p.cmdline()).kill()
    assert cli.run("down", "--name", "ray").returncode == 0
    assert_nothing_left(cli, "ray")
