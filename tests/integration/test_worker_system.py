"""The main job on real parts: a model behind Ray Serve, two store nodes, a Valkey; all calls through the public gRPC and HTTP services.

One system for the whole file, since its start is most of the time. It stores `raw`, so that an answer from the store must be the one
without it, token for token. The tests run in the order of the file; the last ones break parts of the system.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time
import urllib.request
from contextlib import suppress

import grpc
import openai
import psutil
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos.concertina.inference.v1 import inference_pb2 as pb
from protos.concertina.inference.v1 import inference_pb2_grpc as rpc
from tests.fault.hostile import NO_TEXT
from tests.system_support import Cli, marked, until, valkeys

NAME, MODEL = "suite", "SmolLM2-135M-Instruct"
TOKENS = {"a": "token-of-a", "b": "token-of-b"}
DOCUMENT = "Notes of the harbour. " + " ".join(f"Entry {i}: the lamp of pier {i * 7 % 23} burns {i % 5} hours." for i in range(24))
TIMEOUT_S = 120.0


@pytest.fixture(scope="module")
def cli(tmp_path_factory):
    state = tmp_path_factory.mktemp("state")
    tenants = state / "tenants.json"
    tenants.write_text(json.dumps({hashlib.sha256(token.encode()).hexdigest(): f"tenant-{name}" for name, token in TOKENS.items()}))
    for name, token in TOKENS.items():
        (state / f"{name}.token").write_text(token)
    cli = Cli(state)
    try:
        up = cli.run("up", "--name", NAME, "--arena", "64MiB", "--codec", "raw", "--tenants", str(tenants), timeout_s=600)
        assert up.returncode == 0, up.stderr
        yield cli
    finally:
        cli.run("down", "--name", NAME)


@pytest.fixture(scope="module")
def system(cli):
    return cli.json("status", "--name", NAME)


@pytest.fixture(scope="module")
def channel(system):
    with grpc.insecure_channel(system["inference"]) as channel:
        yield channel


@pytest.fixture(scope="module")
def stub(channel):
    return rpc.InferenceServiceStub(channel)


@pytest.fixture(scope="module")
def client(system):
    return openai_client(system)


def openai_client(system, key: str = TOKENS["a"]) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{system['http']}/v1", api_key=key, max_retries=0, timeout=TIMEOUT_S)


def details(error: grpc.RpcError, kind):
    """The part of ``google.rpc.Status`` of a type, or None."""
    raw = dict(error.trailing_metadata())["grpc-status-details-bin"]
    for part in status_pb2.Status.FromString(raw).details:
        made = kind()
        if part.Unpack(made):
            return made
    return None


def bearer(tenant: str = "a") -> list[tuple[str, str]]:
    return [("authorization", f"Bearer {TOKENS[tenant]}")]


def request(text: str = "", n: int = 8, mode: int = pb.CACHE_MODE_USE, **fields) -> pb.GenerateRequest:
    made = pb.GenerateRequest(sampling=pb.Sampling(max_new_tokens=n), cache=pb.CacheOptions(mode=mode), **fields)
    if text:
        made.text = text
    return made


def ask(stub, made: pb.GenerateRequest, tenant: str = "a", timeout_s: float = TIMEOUT_S) -> pb.GenerateResponse:
    return stub.Generate(made, timeout=timeout_s, metadata=bearer(tenant))


def published(cli) -> int:
    return sum(node["blocks"] for node in cli.json("status", "--name", NAME)["nodes"])


def requests_by_code(system) -> dict[str, float]:
    """Of `concertina_requests_total`, from the worker's metrics page."""
    page = urllib.request.urlopen(f"http://{system['workers'][0]['metrics']}/metrics", timeout=10).read().decode()
    rows = [line for line in page.splitlines() if line.startswith("concertina_requests_total{")]
    return {row.split('code="')[1].split('"')[0]: float(row.rsplit(" ", 1)[1]) for row in rows}


def test_the_front_calls_a_replica_of_its_host_over_a_unix_socket(stub, system):
    ask(stub, request("Are you near?", n=1))
    pid = system["workers"][0]["pid"]
    files = (os.path.join(f"/proc/{pid}/fd", name) for name in os.listdir(f"/proc/{pid}/fd"))
    inodes = {os.readlink(file).removeprefix("socket:[").removesuffix("]") for file in files if os.path.islink(file)}
    with open("/proc/net/unix") as table:
        sockets = [(row[5], row[6], row[7]) for row in map(str.split, table) if len(row) == 8]
    connected = [path for state, inode, path in sockets if state == "03" and inode in inodes and "/sockets/replica-" in path]
    assert connected and oct(os.stat(connected[0]).st_mode & 0o777) == "0o600"


def test_health_and_reflection_are_served_without_a_credential(channel):
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    services = ProtoReflectionDescriptorDatabase(channel).get_services()
    assert {"concertina.inference.v1.InferenceService", "grpc.health.v1.Health"} <= set(services)


def test_a_watcher_of_health_gets_an_answer_and_watchers_are_bounded(channel):
    health, ask = health_pb2_grpc.HealthStub(channel), health_pb2.HealthCheckRequest()
    watchers = [health.Watch(ask, timeout=TIMEOUT_S) for _ in range(8)]
    assert all(next(watcher).status == health_pb2.HealthCheckResponse.SERVING for watcher in watchers)
    with pytest.raises(grpc.RpcError) as refused:
        next(health.Watch(ask, timeout=TIMEOUT_S))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    for watcher in watchers:
        watcher.cancel()


def test_a_message_beyond_all_prompts_is_not_read(stub):
    with pytest.raises(grpc.RpcError) as refused:
        ask(stub, request("x" * (17 << 20)))
    assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_model_info_describes_the_model(stub):
    info = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=TIMEOUT_S, metadata=bearer())
    assert (info.model, info.layers, info.kv_heads, info.head_dim, info.codec) == (MODEL, 30, 3, 64, "raw")
    assert info.context_window == 8192 and info.vocab_size == 49152 and info.block_tokens == 64


@pytest.mark.parametrize("metadata", [[], [("authorization", "Bearer nobody")], [("tenant", "tenant-a")]])
def test_strangers_are_turned_away(stub, metadata):
    with pytest.raises(grpc.RpcError) as refused:
        stub.Generate(request("hi"), timeout=TIMEOUT_S, metadata=metadata)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


BAD = {
    "no prompt": request(),
    "no room": request("hi", n=0),
    "foreign token": request(tokens=pb.TokenIds(ids=[49152])),
    "beyond the window": request(tokens=pb.TokenIds(ids=[5] * 9000)),
    "unknown press": request("hi", kv_budget=pb.KvBudget(press="crush", tokens=64)),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_input_is_an_invalid_argument_that_names_the_mend(stub, name, streamed):
    with pytest.raises(grpc.RpcError) as refused:
        if streamed:
            list(stub.GenerateStream(BAD[name], timeout=TIMEOUT_S, metadata=bearer()))
        else:
            ask(stub, BAD[name])
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert len(refused.value.details()) > 15


def test_every_form_of_prompt_is_answered(stub):
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="What is the capital of France? Answer in one word.")])
    assert "Paris" in ask(stub, request(chat=chat, n=16)).text
    answer = ask(stub, request(tokens=pb.TokenIds(ids=[1, 2, 3] * 10), n=3, request_id="mine"))
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.request_id) == (30, 3, "mine")


def test_a_seed_fixes_the_sample(stub):
    made = request("Once upon a time", n=12)
    made.sampling.temperature, made.sampling.seed = 0.9, 7
    assert list(ask(stub, made).tokens) == list(ask(stub, made).tokens)


def test_stop_strings_end_an_answer_and_stay_out_of_it(stub):
    made = request("Count: one two three four", n=40)
    made.sampling.stop.append(" ")
    answer = ask(stub, made)
    assert answer.finish_reason == "stop" and " " not in answer.text


def test_the_second_answer_comes_from_the_store_and_is_the_same(cli, stub):
    cold = ask(stub, request(DOCUMENT))
    assert cold.usage.cached_tokens == 0
    blocks = cold.usage.prompt_tokens // 64
    until(lambda: published(cli) >= blocks, what="the blocks of the document")
    warm = ask(stub, request(DOCUMENT))
    assert warm.usage.cached_tokens >= 64 * (blocks - 1)
    assert warm.cache.blocks_hit > 0 and warm.cache.bytes_fetched > 0 and warm.cache.distortion == 0
    bypass = ask(stub, request(DOCUMENT, mode=pb.CACHE_MODE_BYPASS))
    assert bypass.usage.cached_tokens == 0
    assert list(cold.tokens) == list(warm.tokens) == list(bypass.tokens)


def test_a_stream_is_the_unary_answer_in_parts(stub):
    whole = ask(stub, request(DOCUMENT))
    parts = list(stub.GenerateStream(request(DOCUMENT, request_id="s"), timeout=TIMEOUT_S, metadata=bearer()))
    assert "".join(p.text for p in parts) == whole.text
    assert [t for p in parts for t in p.tokens] == list(whole.tokens)
    assert parts[-1].usage == whole.usage and parts[-1].finish_reason == whole.finish_reason
    assert len(parts) > 1 and all(p.request_id == "s" for p in parts)


def test_a_tenant_never_hits_anothers_blocks(stub):
    other = ask(stub, request(DOCUMENT), tenant="b")
    assert other.usage.cached_tokens == 0 and other.cache.blocks_hit == 0


def test_reading_only_publishes_nothing(cli, stub):
    text = "A log that nobody keeps. " + "The tide was low and the wind was north. " * 20
    before = ask(stub, request(text, n=2, mode=pb.CACHE_MODE_READ_ONLY))
    time.sleep(2)
    assert ask(stub, request(text, n=2, mode=pb.CACHE_MODE_READ_ONLY)).usage.cached_tokens == before.usage.cached_tokens == 0


def test_a_caller_that_goes_away_stops_the_model(system, stub):
    # The deadline ends a request in the engine, or by Serve's cancellation, whichever comes first.
    def ended() -> float:
        codes = requests_by_code(system)
        return codes.get("CANCELLED", 0) + codes.get("DEADLINE_EXCEEDED", 0)

    before = ended()
    with pytest.raises(grpc.RpcError) as late:
        ask(stub, request("Tell a long story.", n=4000), timeout_s=1.0)
    assert late.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    stream = stub.GenerateStream(request("Tell another long story.", n=4000), timeout=TIMEOUT_S, metadata=bearer())
    next(stream)
    stream.cancel()
    until(lambda: ended() >= before + 2, what="two requests that ended early")
    assert requests_by_code(system)["INVALID_ARGUMENT"] >= 2 * len(BAD)


def test_an_error_carries_its_reason(stub):
    with pytest.raises(grpc.RpcError) as refused:
        ask(stub, BAD["no prompt"])
    assert details(refused.value, error_details_pb2.ErrorInfo).reason == "INVALID_INPUT"


def test_an_answer_that_broke_off_goes_on_behind_its_tokens(stub):
    made = request("A list of harbours:", n=12)
    whole = list(ask(stub, made).tokens)
    made.resume.ids.extend(whole[:5])
    assert list(ask(stub, made).tokens) == whole[5:]


def test_openais_client_gets_the_same_text(stub, client):
    assert [m.id for m in client.models.list()] == [MODEL]
    over_grpc = ask(stub, request(DOCUMENT))
    asked = {"model": MODEL, "prompt": DOCUMENT, "max_tokens": 8, "temperature": 0}
    answer = client.completions.create(**asked)
    assert answer.choices[0].text == over_grpc.text and answer.choices[0].finish_reason == over_grpc.finish_reason
    assert answer.usage.prompt_tokens == over_grpc.usage.prompt_tokens
    assert answer.usage.prompt_tokens_details.cached_tokens == over_grpc.usage.cached_tokens > 0
    parts = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(p.choices[0].text for p in parts[:-1]) == over_grpc.text
    assert parts[-1].usage.completion_tokens == 8


def test_openais_client_chats(client):
    asked = {"model": MODEL, "messages": [{"role": "user", "content": "What is the capital of France? Answer in one word."}]}
    whole = client.chat.completions.create(**asked, max_completion_tokens=16, temperature=0)
    assert "Paris" in whole.choices[0].message.content and whole.choices[0].message.role == "assistant"
    parts = client.chat.completions.create(**asked, max_tokens=16, temperature=0, stream=True)
    assert "".join(p.choices[0].delta.content or "" for p in parts) == whole.choices[0].message.content


def test_openais_client_raises_its_own_errors(system, client):
    with pytest.raises(openai.AuthenticationError):
        openai_client(system, "nobody").completions.create(model=MODEL, prompt="x")
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="another", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="x", n=2, stream=True)
    assert refused.value.param == "n"


def test_a_client_of_http_that_leaves_stops_the_model(system, client):
    before = requests_by_code(system).get("CANCELLED", 0)
    stream = client.completions.create(model=MODEL, prompt="Tell a story.", max_tokens=4000, stream=True, extra_body={"ignore_eos": True})
    next(iter(stream))
    stream.close()
    until(lambda: requests_by_code(system).get("CANCELLED", 0) >= before + 1, what="a cancelled request")


def test_the_command_line_asks_the_same_way(cli):
    credential = ("--credential", str(cli.state / "a.token"))
    prompt = ("generate", "Once upon a time", "--name", NAME, "--max-new-tokens", "4", *credential)
    answer = cli.json(*prompt)
    assert answer["usage"] == {"prompt_tokens": 4, "cached_tokens": 0, "completion_tokens": 4} and len(answer["tokens"]) == 4
    assert cli.run(*prompt, "--stream").stdout.strip() == answer["text"].strip()
    assert cli.run("generate", "x", "--name", NAME, "--temperature", "-1", *credential).returncode == 2
    assert cli.run("generate", "x", "--name", NAME).returncode == 1
    assert cli.json("blocks", "ls", "--name", NAME, "--limit", "2")[0]["tokens"] == 64


def test_status_names_every_part(system):
    worker = system["workers"][0]
    assert (worker["engine"], worker["device"], len(system["workers"]), len(system["nodes"])) == ("transformers", "cpu", 1, 2)
    assert psutil.pid_exists(worker["pid"]) and all(psutil.pid_exists(n["pid"]) for n in system["nodes"])
    assert all(system[key] is None for key in ("prometheus", "console"))


def test_a_path_that_is_no_text_does_not_end_the_service(system, stub):
    """gRPC ends its server for it; Serve's proxy, which would go on without one, ends too and is started anew."""

    def served():
        try:
            return stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=5, metadata=bearer()).model
        except grpc.RpcError:
            return ""

    host, _, port = system["inference"].rpartition(":")
    for _ in range(2):
        with socket.create_connection((host, int(port)), 5) as stranger:
            stranger.sendall(NO_TEXT)
            with suppress(OSError):
                while stranger.recv(4096):  # to its end: a server that has not heard it yet still answers others
                    pass
        until(served, TIMEOUT_S)


def test_a_killed_node_costs_time_and_no_answer(system, stub):
    expected = list(ask(stub, request(DOCUMENT, mode=pb.CACHE_MODE_BYPASS)).tokens)
    os.kill(system["nodes"][0]["pid"], signal.SIGKILL)
    for _ in range(2):
        assert list(ask(stub, request(DOCUMENT)).tokens) == expected


def test_without_redis_answers_go_on(cli, stub):
    expected = list(ask(stub, request(DOCUMENT, mode=pb.CACHE_MODE_BYPASS)).tokens)
    for server in valkeys(cli.state):
        server.kill()
    for _ in range(2):
        assert list(ask(stub, request(DOCUMENT)).tokens) == expected


def test_a_dead_worker_in_the_middle_of_a_stream_is_a_typed_error(system, stub, client):
    stream = stub.GenerateStream(request("Tell a long story.", n=4000), timeout=TIMEOUT_S, metadata=bearer())
    asked = {"model": MODEL, "prompt": "Tell another.", "max_tokens": 4000, "extra_body": {"ignore_eos": True}}
    over_http = iter(client.completions.create(**asked, stream=True))
    received = [*next(stream).tokens]
    next(over_http)
    os.kill(system["workers"][0]["pid"], signal.SIGKILL)
    with pytest.raises(grpc.RpcError) as lost:
        for part in stream:
            received += part.tokens
    assert lost.value.code() is grpc.StatusCode.UNAVAILABLE and "resume" in lost.value.details()
    info = details(lost.value, error_details_pb2.ErrorInfo)
    assert info.reason == "REPLICA_LOST" and int(info.metadata["tokens_sent"]) == len(received)
    assert details(lost.value, error_details_pb2.RetryInfo).retry_delay.seconds >= 1
    with pytest.raises(openai.APIError, match="gone"):
        list(over_http)


def test_down_leaves_no_process_even_of_a_broken_system(cli):
    assert marked(f"{NAME}-")
    assert cli.run("down", "--name", NAME).returncode == 0
    assert not marked(f"{NAME}-") and not valkeys(cli.state)
