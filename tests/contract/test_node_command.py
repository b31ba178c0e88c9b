"""``concertina node`` as a process: one line when ready, a quick start without torch, an orderly end, refusals with exit code 2."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
from tests.node_support import block, chain, frames

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-c", "import sys; from services.cli import main; sys.exit(main())", "node"]


def spawn(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([*COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture
def node() -> Iterator[tuple[subprocess.Popen[str], dict]]:
    process = spawn("--arena", "8MiB", "--metrics", "127.0.0.1:0", "--id", "n1")
    try:
        yield process, json.loads(process.stdout.readline())
    finally:
        process.kill()
        process.communicate()


def test_ready_serve_end(node) -> None:
    process, ready = node
    assert ready["ready"] is True
    assert (ready["id"], ready["pid"], ready["device"]) == ("n1", process.pid, "cpu")
    assert ready["metrics"].startswith("127.0.0.1:")
    with grpc.insecure_channel(ready["address"]) as channel:
        stub = rpc.KVStoreServiceStub(channel)
        assert list(stub.Put(frames(chain(3))).statuses) == [pb.BLOCK_STATUS_OK] * 3
        payload = b"".join(f.payload for f in stub.Get(pb.GetRequest(keys=[block(1).header.key])))
        assert payload == b"".join(chain(2)[1].payload)
        assert stub.Stats(pb.StatsRequest()).arena_bytes == 8 << 20
    maps = Path(f"/proc/{process.pid}/maps").read_text()
    assert "libtorch" not in maps, "a CPU node has no need of torch"
    assert "concertina-arena" in maps
    limits = Path(f"/proc/{process.pid}/limits").read_text()
    soft, hard = re.search(r"Max open files\s+(\d+)\s+(\d+)", limits).groups()
    assert int(soft) >= min(int(hard), 65_536), "each connection is an open file"
    process.send_signal(signal.SIGTERM)
    assert process.wait(15) == 0


@pytest.mark.parametrize(("listen", "warned"), [("127.0.0.1:0", False), ("0.0.0.0:0", True)])
def test_plain_text_beyond_this_machine_is_said(listen: str, warned: bool) -> None:
    process = spawn("--arena", "8MiB", "--listen", listen)
    try:
        assert json.loads(process.stdout.readline())["ready"]
    finally:
        process.terminate()
        _, err = process.communicate(timeout=30)
    assert ("plain text" in err) == warned


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--arena", "0"], "--arena"),
        (["--arena", "big"], "256MiB"),
        (["--arena", "100000GiB"], "--arena"),
        (["--device", "abacus"], "cpu"),
        (["--policy", "none-such"], "known"),
        (["--listen", "nowhere"], "HOST:PORT"),
        (["--page-bytes", "1000"], "power of two"),
        (["--redis", "http://x"], "redis://"),
        (["--id", "a b"], "letters"),
        (["--spill", "/tmp"], "--spill-bytes"),
        (["--spill", "/dev/null/x", "--spill-bytes", "1MiB"], "--spill"),
        (["--credentials", "/no/such/file"], "credentials"),
        (["--tls-cert", "/no/such/file", "--tls-key", "/no/such/file"], "--tls-cert"),
        (["--tls-client-ca", "/dev/null"], "--tls-cert"),
    ],
)
def test_impossible_settings_are_refused_with_the_mend(arguments: list[str], word: str) -> None:
    process = spawn(*arguments)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert not out
    assert word in err
    assert "Traceback" not in err
