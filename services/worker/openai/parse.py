"""From OpenAI's body to the request that gRPC carries.

Here is checked only what that message cannot express: JSON's types, fields whose meaning this service does not have, and the
number of prompts. Values are checked by `services.worker.requests`, for both protocols alike.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from google.protobuf import json_format

from kvstore.errors import InvalidInputError
from protos.concertina.inference.v1 import inference_pb2 as pb

from .errors import FieldError, UnknownModelError

MAX_PROMPTS = 16
#: OpenAI's own default for completions; a chat without a limit gets the service's default.
COMPLETION_TOKENS = 16
NUMBER, WHOLE, FLAG, TEXT = (int, float), (int,), (bool,), (str,)
_NAMES = {NUMBER: "a number", WHOLE: "a whole number", FLAG: "true or false", TEXT: "a string"}
#: Fields that would change the answer in a way this service has not -> values that ask for nothing. What is not named is ignored.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "prompt_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "use_beam_search": (False,),
}
#: Role of OpenAI's newer models -> the one that chat templates know.
ROLES = {"developer": "system"}


@dataclass(frozen=True, slots=True)
class Wanted:
    """What a body asks for: one request for each prompt, and how to answer them."""

    requests: tuple[pb.GenerateRequest, ...]
    stream: bool
    include_usage: bool


def parse(raw: bytes, model: str, *, chat: bool) -> Wanted:
    """Read a body of ``/v1/completions`` or, with `chat`, of ``/v1/chat/completions``.

    Raises
    ------
    FieldError, InvalidInputError
        For a body that is no JSON object, or a field that is wrong or asks for what this service does not have.
    UnknownModelError
        For another model than `model`.
    """
    body = _object(raw)
    wanted = _take(body, "model", TEXT)
    if wanted is None:
        raise FieldError("model", f"you must provide a model; this service has {model!r}")
    if wanted != model:
        raise UnknownModelError(f"the model {wanted!r} does not exist here; use {model!r}")
    _refuse_what_is_missing(body)
    sampling = _sampling(body, COMPLETION_TOKENS if not chat else None)
    requests = []
    for prompt in [_chat(body)] if chat else _prompts(body):
        request = pb.GenerateRequest(**prompt, sampling=sampling)
        _extensions(body, request)
        requests.append(request)
    stream = _take(body, "stream", FLAG, False)
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or (options and not stream):
        raise FieldError("stream_options", "stream_options must be an object, and goes with stream: true only")
    return Wanted(tuple(requests), stream, _take(options, "include_usage", FLAG, False))


def _object(raw: bytes) -> dict[str, Any]:
    try:
        body = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise InvalidInputError("the body must be one JSON object")
    return body


def _take(body: dict[str, Any], name: str, kind: tuple[type, ...], default: Any = None) -> Any:
    """A field of the given JSON type; `default` where it is absent or null."""
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kind):
        raise FieldError(name, f"{name} must be {_NAMES[kind]}, not {json.dumps(value)[:60]}")
    return value


def _refuse_what_is_missing(body: dict[str, Any]) -> None:
    for name, neutral in NEUTRAL.items():
        value = body.get(name)
        if value is None or any(value == v and isinstance(value, bool) == isinstance(v, bool) for v in neutral):
            continue
        mend = f"leave it out or set it to {json.dumps(neutral[0])}" if neutral else "leave it out"
        raise FieldError(name, f"{name} {json.dumps(value)[:60]} is not supported here; {mend}")


def _sampling(body: dict[str, Any], default_tokens: int | None) -> pb.Sampling:
    """OpenAI's defaults where they differ from ours: a temperature of 1."""
    limit = _take(body, "max_completion_tokens", WHOLE, _take(body, "max_tokens", WHOLE, default_tokens))
    ignore_eos = _take(body, "ignore_eos", FLAG, False)
    if _take(body, "min_tokens", WHOLE, 0) and not ignore_eos:
        raise FieldError("min_tokens", "min_tokens is not supported here without ignore_eos; leave it out or set ignore_eos to true")
    stop = body.get("stop") or []
    stop = [stop] if isinstance(stop, str) else stop
    if not isinstance(stop, list) or not all(isinstance(s, str) for s in stop):
        raise FieldError("stop", "stop must be a string or a list of strings")
    try:
        return pb.Sampling(
            max_new_tokens=limit,
            temperature=_take(body, "temperature", NUMBER, 1.0),
            top_p=_take(body, "top_p", NUMBER),
            top_k=max(0, _take(body, "top_k", WHOLE, 0)),
            seed=_take(body, "seed", WHOLE),
            stop=stop,
            ignore_eos=ignore_eos,
        )
    except ValueError as error:
        raise InvalidInputError(f"a field is out of range: {error}") from None


def _prompts(body: dict[str, Any]) -> list[dict[str, Any]]:
    """`prompt` as keyword arguments of a request each: a string, a list of token ids, or a list of either."""
    prompt = body.get("prompt")
    several = isinstance(prompt, list) and bool(prompt) and not _whole(prompt[0])
    found = prompt if several else [prompt]
    if len(found) > MAX_PROMPTS:
        raise FieldError("prompt", f"{len(found)} prompts are too many for one call; give at most {MAX_PROMPTS}")
    return [_prompt(one) for one in found]


def _prompt(prompt: Any) -> dict[str, Any]:
    try:
        if isinstance(prompt, str):
            return {"text": _encodable("prompt", prompt)}
        if isinstance(prompt, list) and all(map(_whole, prompt)):
            return {"tokens": pb.TokenIds(ids=prompt)}
    except ValueError as error:
        raise FieldError("prompt", f"a token id of the prompt is out of range: {error}") from None
    raise FieldError("prompt", "prompt must be a string, a list of token ids, or a list of these")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _chat(body: dict[str, Any]) -> dict[str, Any]:
    """`messages` as keyword arguments of a request."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise FieldError("messages", "messages must be a list of objects with a role and a content")
    made = pb.ChatPrompt()
    for at, message in enumerate(messages):
        name = f"messages[{at}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise FieldError(name, f"{name} must be an object with a role and a content")
        role = _encodable(name, message["role"])
        made.messages.add(role=ROLES.get(role, role), content=_encodable(name, _content(name, message.get("content"))))
    return {"chat": made}


def _content(name: str, content: Any) -> str:
    """Plain text, or the texts of a list of parts."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [None]
    if not all(isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts):
        raise FieldError(f"{name}.content", f"{name}.content must be a string or a list of parts of type text; this model reads text alone")
    return "".join(p["text"] for p in parts)


def _encodable(name: str, text: str) -> str:
    """`text`, unless JSON's escapes made it half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FieldError(name, f"{name} is no valid Unicode text: {error.reason} at {error.start}") from None
    return text


def _extensions(body: dict[str, Any], request: pb.GenerateRequest) -> None:
    """Our own fields `cache` and `kv_budget`, in protobuf's JSON form, as gRPC has them."""
    for name in ("cache", "kv_budget"):
        value = body.get(name)
        if value is None:
            continue
        try:
            json_format.ParseDict(value, getattr(request, name))
        except (json_format.ParseError, AttributeError, TypeError, ValueError) as error:
            raise FieldError(name, f"{name} is not as in GenerateRequest.{name}: {error}") from None
