"""What a worker refuses before it works, and what it makes of what it takes."""

from __future__ import annotations

import math

import pytest
import torch

from kvstore.errors import InvalidInputError
from kvstore.layout import KVLayout
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.engine.base import CacheMode, ModelInfo
from services.worker.requests import to_spec

WINDOW, VOCAB = 100, 1000


class Tokenizer:
    """As much of an engine as a check needs: one token a character, and a template that shows its roles."""

    info = ModelInfo("tiny", "f" * 64, WINDOW, VOCAB, KVLayout(2, 2, 64, torch.bfloat16), 16, "int8", ("window",), "transformers")

    def tokenize(self, text: str) -> list[int]:
        return [ord(c) % VOCAB for c in text]

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        return self.tokenize("".join(f"<{m['role']}>{m['content']}" for m in messages))


def spec(request: pb.GenerateRequest, tenant: str = "default"):
    return to_spec(request, Tokenizer(), tenant)


def request(**fields) -> pb.GenerateRequest:
    """A good request, but for what is given; fields of sampling by their own names."""
    sampling = {k: fields.pop(k) for k in list(fields) if k in pb.Sampling.DESCRIPTOR.fields_by_name}
    if not {"text", "tokens", "chat"} & set(fields):
        fields["text"] = "hello"
    return pb.GenerateRequest(sampling=pb.Sampling(**sampling), **fields)


REFUSED = {
    "no prompt": (pb.GenerateRequest(), "text, tokens or chat"),
    "empty text": (request(text=""), "empty"),
    "no tokens": (request(tokens=pb.TokenIds()), "empty"),
    "no messages": (request(chat=pb.ChatPrompt()), "at least one message"),
    "negative token": (request(tokens=pb.TokenIds(ids=[3, -1])), "0 to 999"),
    "token beyond the vocabulary": (request(tokens=pb.TokenIds(ids=[VOCAB])), "0 to 999"),
    "prompt fills the window": (request(text="x" * WINDOW), "shorten"),
    "huge text": (request(text="x" * 1_000_000), "shorten"),
    "prompt and answer exceed the window": (request(text="x" * 60, max_new_tokens=41), "at most 40"),
    "max_new_tokens 0": (request(max_new_tokens=0), "at least 1"),
    "max_new_tokens negative": (request(max_new_tokens=-5), "at least 1"),
    "temperature negative": (request(temperature=-0.1), "temperature"),
    "temperature NaN": (request(temperature=math.nan), "temperature"),
    "temperature infinite": (request(temperature=math.inf), "temperature"),
    "top_p 0": (request(top_p=0.0), "top_p"),
    "top_p above 1": (request(top_p=1.01), "top_p"),
    "top_p NaN": (request(top_p=math.nan), "top_p"),
    "top_k negative": (request(top_k=-1), "top_k"),
    "too many stops": (request(stop=["a"] * 17), "at most 16"),
    "empty stop": (request(stop=[""]), "1 to 256"),
    "long stop": (request(stop=["é" * 129]), "1 to 256"),
    "long request_id": (request(request_id="x" * 257), "256"),
    "unknown role": (request(chat=pb.ChatPrompt(messages=[pb.ChatMessage(role="robot", content="hi")])), "system, user, assistant"),
    "unknown press": (request(kv_budget=pb.KvBudget(press="crush", tokens=8)), "window"),
    "press without budget": (request(kv_budget=pb.KvBudget(press="window")), "kv_budget.tokens"),
    "budget without press": (request(kv_budget=pb.KvBudget(tokens=8)), "kv_budget.press"),
    "unknown cache mode": (request(cache=pb.CacheOptions(mode=9)), "CACHE_MODE_USE"),
    "max_distortion NaN": (request(cache=pb.CacheOptions(max_distortion=math.nan)), "max_distortion"),
    "max_distortion negative": (request(cache=pb.CacheOptions(max_distortion=-1)), "max_distortion"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_requests_are_refused_with_the_mend(name):
    bad, mend = REFUSED[name]
    with pytest.raises(InvalidInputError, match=mend):
        spec(bad)


def test_every_prompt_form_becomes_tokens():
    assert spec(request(text="ab")).tokens == (97, 98)
    assert spec(request(tokens=pb.TokenIds(ids=[0, VOCAB - 1]))).tokens == (0, VOCAB - 1)
    chat = pb.ChatPrompt(messages=[pb.ChatMessage(role="user", content="hi")])
    assert spec(request(chat=chat)).tokens == tuple(map(ord, "<user>hi"))


@pytest.mark.parametrize(("prompt", "expected"), [("x", WINDOW - 1), ("x" * 99, 1)])
def test_unset_length_takes_what_the_window_leaves(prompt, expected):
    assert spec(request(text=prompt)).sampling.max_new_tokens == expected


def test_the_whole_window_may_be_asked_for():
    assert spec(request(text="x" * 60, max_new_tokens=40)).sampling.max_new_tokens == 40


def test_defaults_are_greedy_and_open():
    sampling = spec(request()).sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed, sampling.stop) == (0.0, 1.0, 0, None, ())


def test_a_seed_of_zero_is_a_seed():
    assert spec(request(seed=0)).sampling.seed == 0


def test_cache_options_and_tenant_are_passed_on():
    made = spec(request(cache=pb.CacheOptions(mode=pb.CACHE_MODE_READ_ONLY, max_distortion=0.5, deadline_ms=250)), tenant="a")
    assert (made.cache_mode, made.max_distortion, made.store_deadline_s, made.tenant) == (CacheMode.READ_ONLY, 0.5, 0.25, "a")
    assert spec(request()).cache_mode is CacheMode.USE
    assert spec(request()).store_deadline_s is None


def test_a_press_comes_with_its_budget():
    made = spec(request(kv_budget=pb.KvBudget(press="window", tokens=8)))
    assert (made.press, made.kv_tokens) == ("window", 8)
