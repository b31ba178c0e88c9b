"""OpenAI's HTTP against an engine that answers from a script: bodies, events, errors, and what becomes of a caller who leaves."""

from __future__ import annotations

import asyncio
import hashlib
import json

import pytest
from starlette.requests import Request

from kvstore.credentials import Caller as Known
from kvstore.credentials import Credentials
from kvstore.errors import CapacityError, TransportError
from kvstore.metrics import Metrics
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.engine.base import CacheReport, Delta
from services.worker.openai import errors
from services.worker.openai.http import MAX_BODY_BYTES, OpenAiHttp
from services.worker.openai.parse import NEUTRAL, parse
from services.worker.service import TIMEOUT_HEADER, Service
from services.worker.tenants import Tenants
from tests.unit.test_requests import Tokenizer

MODEL = "tiny"


class Scripted(Tokenizer):
    """Says ``a b c …`` token by token; remembers what it was asked."""

    def __init__(self, error: Exception | None = None, pause_s: float = 0.0, after: int = 0) -> None:
        self.error, self.pause_s, self.after = error, pause_s, after
        self.asked, self.closed = [], 0

    async def generate(self, spec):
        self.asked.append(spec)
        count = spec.sampling.max_new_tokens
        try:
            for number in range(count):
                if self.error and number >= self.after:
                    raise self.error
                await asyncio.sleep(self.pause_s)
                last = number == count - 1
                report = CacheReport(cached_tokens=2 if last else 0)
                yield Delta(chr(97 + number % 26), [number], "length" if last else "", len(spec.tokens), number + 1, report)
        finally:
            self.closed += 1


class Caller:
    """One service on a scripted engine, called as Serve's proxy does."""

    def __init__(self, engine: Scripted, token: str | None = None) -> None:
        self.metrics = Metrics()
        known = {hashlib.sha256(token.encode()).hexdigest(): Known("team")} if token else None
        self.http = OpenAiHttp(Service(engine, Tenants(Credentials(known)), self.metrics))

    async def __call__(self, path: str, body=None, method: str = "POST", headers: dict | None = None):
        """Status, headers and body."""
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        sent = [{"type": "http.request", "body": raw, "more_body": False}]
        scope = {
            "type": "http", "method": method, "path": path, "query_string": b"", "asgi": {"spec_version": "2.4"},
            "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }  # fmt: skip

        async def receive():
            return sent.pop() if sent else await asyncio.Event().wait()

        got = []

        async def send(message):
            got.append(message)

        response = await self.http.answer(Request(scope, receive))
        await response(scope, receive, send)
        text = b"".join(m.get("body", b"") for m in got).decode()
        return got[0]["status"], {k.decode(): v.decode() for k, v in got[0]["headers"]}, text

    def counted(self, code: str) -> float:
        return self.metrics.requests.labels(code=code)._value.get()


def completion(**fields) -> dict:
    return {"model": MODEL, "prompt": "hello", "max_tokens": 3, **fields}


def chat(**fields) -> dict:
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, **fields}


def events(text: str) -> list:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


async def test_a_completion_has_openais_shape():
    status, headers, text = await Caller(Scripted())("/v1/completions", completion())
    answer = json.loads(text)
    assert status == 200 and headers["content-type"] == "application/json"
    assert answer["object"] == "text_completion" and answer["model"] == MODEL and answer["id"].startswith("cmpl-")
    assert answer["choices"] == [{"index": 0, "text": "abc", "logprobs": None, "finish_reason": "length"}]
    assert answer["usage"] == {
        "prompt_tokens": 5, "completion_tokens": 3, "total_tokens": 8, "prompt_tokens_details": {"cached_tokens": 2},
    }  # fmt: skip


async def test_a_chat_has_openais_shape():
    answer = json.loads((await Caller(Scripted())("/v1/chat/completions", chat()))[2])
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "abc", "refusal": None}
    assert answer["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("with_usage", [False, True])
async def test_a_streamed_completion_ends_with_done(with_usage):
    options = {"stream_options": {"include_usage": True}} if with_usage else {}
    status, headers, text = await Caller(Scripted())("/v1/completions", completion(stream=True, **options))
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(text)
    assert done == "[DONE]"
    if with_usage:
        assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["total_tokens"] == 8
        assert all(c["usage"] is None for c in chunks[:-1])
        chunks.pop()
    assert "".join(c["choices"][0]["text"] for c in chunks) == "abc"
    assert [c["choices"][0]["finish_reason"] for c in chunks][-1] == "length"


async def test_a_streamed_chat_opens_with_the_role():
    *chunks, done = events((await Caller(Scripted())("/v1/chat/completions", chat(stream=True)))[2])
    deltas = [c["choices"][0]["delta"] for c in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""} and deltas[-1] == {} and done == "[DONE]"
    assert "".join(d.get("content", "") for d in deltas) == "abc"
    assert len({c["id"] for c in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_several_prompts_have_a_choice_each(stream):
    text = (await Caller(Scripted())("/v1/completions", completion(prompt=["one", [5, 6]], stream=stream)))[2]
    if stream:
        texts = {0: "", 1: ""}
        for chunk in events(text)[:-1]:
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
        assert texts == {0: "abc", 1: "abc"}
    else:
        answer = json.loads(text)
        assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, "abc"), (1, "abc")]
        assert answer["usage"]["prompt_tokens"] == 5 and answer["usage"]["completion_tokens"] == 6


REFUSED = {
    "no JSON": (b"{", 400, None),
    "deep JSON": (b"[" * 100_000, 400, None),
    "no object": (b"[]", 400, None),
    "no model": ({"prompt": "x"}, 400, "model"),
    "another model": (completion(model="gpt"), 404, "model"),
    "no prompt": ({"model": MODEL}, 400, "prompt"),
    "a prompt of another type": (completion(prompt={"a": 1}), 400, "prompt"),
    "a token beyond int32": (completion(prompt=[1 << 40]), 400, "prompt"),
    "a foreign token": (completion(prompt=[5000]), 400, None),
    "half a character": (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "prompt"),
    "too many prompts": (completion(prompt=["x"] * 17), 400, "prompt"),
    "two choices": (completion(n=2), 400, "n"),
    "logprobs": (completion(logprobs=0), 400, "logprobs"),
    "echo": (completion(echo=True), 400, "echo"),
    "a temperature in words": (completion(temperature="hot"), 400, "temperature"),
    "a temperature below 0": (completion(temperature=-1), 400, None),
    "NaN": (b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, None),
    "max_tokens of 0": (completion(max_tokens=0), 400, None),
    "max_tokens beyond the window": (completion(max_tokens=1000), 400, None),
    "max_tokens beyond int32": (completion(max_tokens=1 << 40), 400, None),
    "true for a number": (completion(seed=True), 400, "seed"),
    "stop of numbers": (completion(stop=[1]), 400, "stop"),
    "stream options without a stream": (completion(stream_options={"include_usage": True}), 400, "stream_options"),
    "min_tokens": (completion(min_tokens=2), 400, "min_tokens"),
    "an unknown cache mode": (completion(cache={"mode": "NEVER"}), 400, "cache"),
}
REFUSED_CHATS = {
    "no messages": ({"model": MODEL}, 400, "messages"),
    "an empty conversation": (chat(messages=[]), 400, None),
    "a message without a role": (chat(messages=[{"content": "x"}]), 400, "messages[0]"),
    "an image": (chat(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "messages[0].content"),
    "an unknown role": (chat(messages=[{"role": "robot", "content": "x"}]), 400, None),
    "tools": (chat(tools=[{"type": "function"}]), 400, "tools"),
    "JSON mode": (chat(response_format={"type": "json_object"}), 400, "response_format"),
}


@pytest.mark.parametrize("name", [*REFUSED, *REFUSED_CHATS])
@pytest.mark.parametrize("stream", [False, True])
async def test_bad_bodies_are_refused_in_openais_shape(name, stream):
    path = "/v1/completions" if name in REFUSED else "/v1/chat/completions"
    body, expected, param = (REFUSED | REFUSED_CHATS)[name]
    if isinstance(body, dict) and stream:
        body = {**body, "stream": True} if "stream_options" not in body else body
    caller = Caller(Scripted())
    status, headers, text = await caller(path, body)
    error = json.loads(text)["error"]
    assert status == expected and headers["content-type"] == "application/json" and "retry-after" not in headers
    assert set(error) == {"message", "type", "param", "code"} and error["type"] == "invalid_request_error"
    assert error["param"] == param and len(error["message"]) > 10
    assert caller.counted("INVALID_ARGUMENT") + caller.counted("NOT_FOUND") == 1


async def test_paths_and_methods_that_are_not_there():
    caller = Caller(Scripted())
    assert (await caller("/v1/embeddings", {}))[0] == 404
    assert (await caller("/v1/completions", method="GET"))[0] == 405
    assert (await caller("/v1/models/other", method="GET"))[0] == 404
    assert (await caller("/v1/completions", b" " * (MAX_BODY_BYTES + 1)))[0] == 413
    assert (await caller("/health", method="GET"))[0] == 200
    assert json.loads((await caller("/v1/models", method="GET"))[2])["data"][0]["id"] == MODEL
    assert json.loads((await caller(f"/v1/models/{MODEL}", method="GET"))[2])["object"] == "model"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_full_queue_says_when_to_try_again(stream):
    caller = Caller(Scripted(CapacityError("full")))
    status, headers, text = await caller("/v1/completions", completion(stream=stream))
    assert status == 429 and int(headers["retry-after"]) >= 1
    assert json.loads(text)["error"]["type"] == "rate_limit_error" and caller.counted("RESOURCE_EXHAUSTED") == 1


async def test_an_error_on_the_way_is_the_last_event():
    caller = Caller(Scripted(TransportError("gone"), after=1, pause_s=0.001))
    status, _, text = await caller("/v1/completions", completion(stream=True, max_tokens=5))
    assert status == 200 and events(text)[-1]["error"]["message"] == "gone" and caller.counted("UNAVAILABLE") == 1


async def test_what_we_did_not_raise_is_not_shown():
    status, _, text = await Caller(Scripted(RuntimeError("secret")))("/v1/completions", completion())
    assert status == 500 and "secret" not in text and json.loads(text)["error"]["type"] == "server_error"


async def test_credentials_are_asked_for_as_bearer_tokens():
    caller = Caller(Scripted(), "key")
    assert (await caller("/v1/completions", completion()))[0] == 401
    assert (await caller("/v1/models", method="GET"))[0] == 401
    assert (await caller("/v1/completions", completion(), headers={"authorization": "Bearer key"}))[0] == 200


async def test_a_caller_who_leaves_ends_the_generation():
    engine = Scripted(pause_s=0.01)
    caller = Caller(engine)
    task = asyncio.create_task(caller("/v1/completions", completion(stream=True, max_tokens=90)))
    await asyncio.sleep(0.1)
    task.cancel()
    await asyncio.wait({task})
    await asyncio.sleep(0)
    assert engine.closed == 1 and caller.counted("CANCELLED") == 1


async def test_one_failing_prompt_ends_the_others():
    engine = Scripted(pause_s=0.01)
    status, _, _ = await Caller(engine)("/v1/completions", completion(prompt=["fine", [5000]], max_tokens=90))
    assert status == 400 and engine.closed == len(engine.asked)


async def test_the_time_a_caller_waits_becomes_the_deadline():
    engine = Scripted()
    caller = Caller(engine)
    await caller("/v1/completions", completion(), headers={TIMEOUT_HEADER: "60000"})
    await caller("/v1/completions", completion())
    assert engine.asked[0].deadline > 0 and engine.asked[1].deadline is None
    assert (await caller("/v1/completions", completion(), headers={TIMEOUT_HEADER: "soon"}))[0] == 400


def one(body: dict, *, chat: bool = False) -> pb.GenerateRequest:
    return parse(json.dumps(body).encode(), MODEL, chat=chat).requests[0]


def test_fields_reach_the_request_by_their_meaning():
    made = one(completion(temperature=0.5, top_p=0.9, top_k=-1, seed=0, stop="x", ignore_eos=True, min_tokens=3, unknown_field=1))
    assert (made.sampling.max_new_tokens, list(made.sampling.stop)) == (3, ["x"])
    assert made.sampling.HasField("seed") and made.sampling.seed == 0
    assert made.sampling.top_k == 0 and made.sampling.ignore_eos and made.sampling.temperature == 0.5
    made = one(completion(cache={"mode": "CACHE_MODE_BYPASS"}, kv_budget={"press": "window", "tokens": 8}))
    assert made.cache.mode == pb.CACHE_MODE_BYPASS and made.kv_budget.tokens == 8


def test_openais_defaults_hold():
    made = one({"model": MODEL, "prompt": "x"})
    assert made.sampling.temperature == 1.0 and made.sampling.max_new_tokens == 16
    made = one({"model": MODEL, "messages": [{"role": "developer", "content": [{"type": "text", "text": "a"}]}]}, chat=True)
    assert not made.sampling.HasField("max_new_tokens") and made.chat.messages[0].role == "system"
    assert one(chat(max_completion_tokens=7), chat=True).sampling.max_new_tokens == 7


def test_values_that_ask_for_nothing_are_taken():
    assert one(completion(**{name: values[0] for name, values in NEUTRAL.items() if values})).text == "hello"
    assert one(completion(**dict.fromkeys(NEUTRAL))).text == "hello"


def test_every_status_has_an_http_kind_but_internal():
    from kvstore.errors import STATUS_OF_ERROR

    assert set(STATUS_OF_ERROR.values()) - set(errors.KINDS) == {"INTERNAL", "DATA_LOSS"}
