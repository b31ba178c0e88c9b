"""From the wire to a checked request: `GenerateRequest` → `GenerateSpec`.

Everything that can be refused is refused here, before any model work, with a message that says what to change.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from kvstore.errors import InvalidInputError
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.engine.base import CacheMode, Engine, GenerateSpec, ModelInfo, SamplingParams

DEFAULT_NEW_TOKENS = 256
MAX_REQUEST_ID_BYTES = 256
MAX_STOPS = 16
MAX_STOP_BYTES = 256
MAX_TEMPERATURE = 100.0
MAX_MESSAGES = 1024
#: No tokenizer in use has much longer tokens; text above this many bytes a token of the window is refused untokenized.
MAX_TEXT_BYTES_PER_TOKEN = 64
ROLES = ("system", "user", "assistant")
CACHE_MODES = {
    pb.CACHE_MODE_UNSPECIFIED: CacheMode.USE,
    pb.CACHE_MODE_USE: CacheMode.USE,
    pb.CACHE_MODE_BYPASS: CacheMode.BYPASS,
    pb.CACHE_MODE_READ_ONLY: CacheMode.READ_ONLY,
}


def to_spec(request: pb.GenerateRequest, engine: Engine, tenant: str) -> GenerateSpec:
    """A checked request.

    Parameters
    ----------
    request : GenerateRequest
        As it came.
    engine : Engine
        Started; gives the limits, the tokenizer and the chat template.
    tenant : str
        From the caller's credential.

    Raises
    ------
    InvalidInputError
        For anything that this model can never answer; the message names the mend.
    """
    if len(request.request_id.encode()) > MAX_REQUEST_ID_BYTES:
        raise InvalidInputError(f"request_id has more than {MAX_REQUEST_ID_BYTES} bytes; shorten it")
    _check_sampling(request.sampling)
    store = _cache_options(request.cache)
    press, kv_tokens = _kv_budget(request.kv_budget, engine.info)
    tokens = prompt_tokens(request, engine)
    resumed = tuple(request.resume.ids)
    _check_ids(resumed, engine.info)
    return GenerateSpec(
        request_id=request.request_id,
        tokens=tokens + resumed,
        sampling=_sampling(request.sampling, len(tokens), len(resumed), engine.info),
        tenant=tenant,
        press=press,
        kv_tokens=kv_tokens,
        **store,
    )


def prompt_tokens(request: pb.GenerateRequest, engine: Engine) -> tuple[int, ...]:
    """Token ids of the prompt, whichever form it has. Raises InvalidInputError for none, an empty or an impossible one."""
    form = request.WhichOneof("prompt")
    if form is None:
        raise InvalidInputError("the request has no prompt; set one of text, tokens or chat")
    if form == "tokens":
        tokens = list(request.tokens.ids)
        _check_ids(tokens, engine.info)
    elif form == "text":
        _check_length(request.text, engine.info)
        tokens = engine.tokenize(request.text) if request.text else []
    else:
        tokens = engine.apply_chat_template(_messages(request.chat, engine.info))
    if not tokens:
        raise InvalidInputError(f"the prompt is empty; give {form} of at least one token")
    window = engine.info.context_window
    if len(tokens) >= window:
        raise InvalidInputError(f"the prompt has {len(tokens)} tokens; the window is {window} with one to generate: shorten it")
    return tuple(tokens)


def _check_ids(tokens: Sequence[int], info: ModelInfo) -> None:
    wrong = next((t for t in tokens if not 0 <= t < info.vocab_size), None)
    if wrong is not None:
        raise InvalidInputError(f"token id {wrong} is not in the vocabulary; ids of {info.model} are 0 to {info.vocab_size - 1}")


def _check_length(text: str, info: ModelInfo) -> None:
    limit = MAX_TEXT_BYTES_PER_TOKEN * info.context_window
    if len(text.encode()) > limit:
        raise InvalidInputError(f"the prompt has more than {limit} bytes, beyond a window of {info.context_window} tokens: shorten it")


def _messages(chat: pb.ChatPrompt, info: ModelInfo) -> list[dict[str, str]]:
    if not chat.messages:
        raise InvalidInputError("the conversation is empty; give at least one message")
    if len(chat.messages) > MAX_MESSAGES:
        raise InvalidInputError(f"the conversation has {len(chat.messages)} messages; give at most {MAX_MESSAGES}")
    for message in chat.messages:
        if message.role not in ROLES:
            raise InvalidInputError(f"role {message.role!r} is not known; use one of {', '.join(ROLES)}")
    _check_length("".join(m.content for m in chat.messages), info)
    return [{"role": m.role, "content": m.content} for m in chat.messages]


def _check_sampling(sampling: pb.Sampling) -> None:
    """The checks that need no prompt."""
    if sampling.HasField("max_new_tokens") and sampling.max_new_tokens < 1:
        raise InvalidInputError(f"max_new_tokens must be at least 1, not {sampling.max_new_tokens}; leave it unset for the default")
    if not 0.0 <= sampling.temperature <= MAX_TEMPERATURE:
        raise InvalidInputError(f"temperature must be from 0 (greedy) to {MAX_TEMPERATURE:g}, not {sampling.temperature:g}")
    if sampling.HasField("top_p") and not 0.0 < sampling.top_p <= 1.0:
        raise InvalidInputError(f"top_p must be above 0 and at most 1, not {sampling.top_p:g}; leave it unset to keep all tokens")
    if sampling.top_k < 0:
        raise InvalidInputError(f"top_k must be at least 0, not {sampling.top_k}; 0 keeps all tokens")
    if len(sampling.stop) > MAX_STOPS:
        raise InvalidInputError(f"{len(sampling.stop)} stop strings are too many; give at most {MAX_STOPS}")
    for stop in sampling.stop:
        if not 1 <= len(stop.encode()) <= MAX_STOP_BYTES:
            raise InvalidInputError(f"each stop string needs 1 to {MAX_STOP_BYTES} bytes, not {len(stop.encode())}")


def _sampling(sampling: pb.Sampling, prompt: int, resumed: int, info: ModelInfo) -> SamplingParams:
    """`resumed` tokens of the answer are there already."""
    room = info.context_window - prompt
    wanted = sampling.max_new_tokens if sampling.HasField("max_new_tokens") else min(DEFAULT_NEW_TOKENS, room)
    if wanted > room:
        raise InvalidInputError(
            f"{prompt} prompt tokens and max_new_tokens {wanted} exceed the context window of {info.context_window}; "
            f"ask for at most {room} or shorten the prompt"
        )
    if resumed >= wanted:
        raise InvalidInputError(f"resume holds {resumed} tokens of an answer of at most {wanted}; nothing is left to generate")
    return SamplingParams(
        max_new_tokens=wanted - resumed,
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop=tuple(sampling.stop),
        ignore_eos=sampling.ignore_eos,
    )


def _cache_options(cache: pb.CacheOptions) -> dict:
    """The fields of `GenerateSpec` that say how the store is used."""
    if cache.mode not in CACHE_MODES:
        raise InvalidInputError(f"cache mode {cache.mode} is not known; use {', '.join(pb.CacheMode.keys())}")
    if not (math.isfinite(cache.max_distortion) and cache.max_distortion >= 0):
        raise InvalidInputError(f"max_distortion must be a number of at least 0, not {cache.max_distortion:g}; 0 takes any block")
    return {
        "cache_mode": CACHE_MODES[cache.mode],
        "max_distortion": cache.max_distortion,
        "store_deadline_s": cache.deadline_ms / 1000 if cache.deadline_ms else None,
    }


def _kv_budget(budget: pb.KvBudget, info: ModelInfo) -> tuple[str, int]:
    """Name of the press and its budget in tokens; empty and 0 for none."""
    if not budget.press:
        if budget.tokens:
            raise InvalidInputError("kv_budget.tokens needs kv_budget.press; name one of " + (", ".join(info.presses) or "none here"))
        return "", 0
    if budget.press not in info.presses:
        raise InvalidInputError(f"press {budget.press!r} is not known; this worker has: {', '.join(info.presses) or 'none'}")
    if budget.tokens < 1:
        raise InvalidInputError(f"press {budget.press!r} needs a budget; set kv_budget.tokens to at least 1")
    return budget.press, budget.tokens
