"""Several replicas of one tiny model: what is asked for goes on while a replica dies, and while all of them are renewed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from kvstore.errors import DeadlineError, TransportError
from kvstore.metadata.embedded import start_valkey
from protos.concertina.inference.v1 import inference_pb2 as pb
from protos.concertina.inference.v1 import inference_pb2_grpc as rpc
from services.system.members import members
from tests.engine_support import make_model
from tests.system_support import until

CALLERS, TOKENS = 3, 100
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    """A worker process of two replicas, its line of JSON, and the URL of its Redis."""
    directory = tmp_path_factory.mktemp("replicas")
    valkey = start_valkey(directory / "redis")
    model = make_model("llama", directory / "model")
    command = [sys.executable, "-m", "services.cli", "worker", "--model", str(model), "--redis", valkey.url, "--listen", "127.0.0.1:0"]
    command += ["--workers", "2", "--codec", "int8", "--drain", "60"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=(directory / "log").open("w"), text=True)
    try:
        line = process.stdout.readline()
        assert line, (directory / "log").read_text()
        yield process, json.loads(line), valkey.url
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        valkey.stop()


def pids(redis: str) -> set[int]:
    """Of the living workers; none where Redis takes long, since the replicas have all cores."""
    try:
        return {record.pid for record in members(redis)[1]}
    except (DeadlineError, TransportError):
        return set()


class Traffic:
    """Callers that ask one request after the other until they are told to stop; every answer is checked for its length."""

    def __init__(self, address: str) -> None:
        self.address, self.stopped = address, False
        self.answers, self.errors = 0, []

    def __enter__(self) -> Traffic:
        self._pool = ThreadPoolExecutor(CALLERS)
        self._callers = [self._pool.submit(self._call, number) for number in range(CALLERS)]
        return self

    def __exit__(self, *error) -> None:
        self.stopped = True
        self._pool.shutdown()
        for caller in self._callers:
            caller.result()

    def _call(self, number: int) -> None:
        with grpc.insecure_channel(self.address) as channel:
            stub = rpc.InferenceServiceStub(channel)
            while not self.stopped:
                sampling = pb.Sampling(max_new_tokens=TOKENS, ignore_eos=True)
                tokens = pb.TokenIds(ids=[number + 1] * 40)
                try:
                    parts = list(stub.GenerateStream(pb.GenerateRequest(tokens=tokens, sampling=sampling), timeout=TIMEOUT_S))
                except grpc.RpcError as error:
                    self.errors.append(error)
                else:
                    assert sum(len(p.tokens) for p in parts) == TOKENS
                    self.answers += 1


def test_the_same_prompt_goes_to_the_same_replica(worker):
    """Each replica counts what it looked up; one of them alone sees the prompt again."""
    _, ready, redis = worker
    pages = [record.metrics for record in members(redis)[1]]

    def looked_up() -> list[float]:
        return [_counter(page, "concertina_lookup_tokens_total") for page in pages]

    with grpc.insecure_channel(ready["inference"]) as channel:
        stub = rpc.InferenceServiceStub(channel)
        request = pb.GenerateRequest(tokens=pb.TokenIds(ids=[7] * 300), sampling=pb.Sampling(max_new_tokens=1))
        stub.Generate(request, timeout=TIMEOUT_S)
        before = looked_up()
        for _ in range(6):
            stub.Generate(request, timeout=TIMEOUT_S)
        after = looked_up()
    assert sorted(b > a for a, b in zip(before, after, strict=True)) == [False, True]


def test_a_dead_replica_costs_what_it_was_answering_and_no_more(worker):
    _, ready, redis = worker
    victim = min(pids(redis))
    with Traffic(ready["inference"]) as traffic:
        until(lambda: traffic.answers > CALLERS, what="traffic")
        os.kill(victim, signal.SIGKILL)
        since = traffic.answers
        until(lambda: traffic.answers > since + CALLERS, what="answers by the other replica")
        until(lambda: len(now := pids(redis)) == 2 and victim not in now, timeout_s=120, what="a new replica")
    assert {error.code() for error in traffic.errors} <= {grpc.StatusCode.UNAVAILABLE}
    assert len(traffic.errors) <= 2 * CALLERS


def test_renewing_all_replicas_loses_no_request(worker):
    """The last one here: while an update goes on, Serve takes the death of a new replica for the update's failure and replaces none."""
    process, ready, redis = worker
    before = pids(redis)
    assert len(before) == 2
    with Traffic(ready["inference"]) as traffic:
        until(lambda: traffic.answers > CALLERS, what="traffic")
        process.send_signal(signal.SIGUSR1)
        until(lambda: len(now := pids(redis)) == 2 and not now & before, timeout_s=120, what="two new replicas")
        since = traffic.answers
        until(lambda: traffic.answers > since + CALLERS, what="answers by the new replicas")
    assert traffic.errors == []


def _counter(page: str, name: str) -> float:
    text = urllib.request.urlopen(f"http://{page}/metrics", timeout=10).read().decode()
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name + "{"))
