"""``concertina generate``: one answer, through the same gRPC call that any client makes."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError, InvalidInputError
from services.system import record


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="?", metavar="TEXT", help="the prompt; - reads it from stdin")
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="system to ask (%(default)s)")
    parser.add_argument("--address", metavar="HOST:PORT", help="ask this address instead")
    parser.add_argument("--tokens-file", metavar="FILE", help="prompt as a JSON list of token ids, instead of TEXT")
    parser.add_argument("--chat", action="store_true", help="send TEXT as a user's message, through the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message before it; implies --chat")
    parser.add_argument("--stream", action="store_true", help="print text as it comes; with --json one object a line")
    parser.add_argument("--max-new-tokens", type=int, metavar="N")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (%(default)s)")
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="0 keeps all tokens (%(default)s)")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before this; may be given more than once")
    parser.add_argument("--cache", choices=("use", "bypass", "read-only"), default="use", help="use of the store (%(default)s)")
    parser.add_argument("--press", default="", help="token-level eviction of this request's live KV")
    parser.add_argument("--kv-tokens", type=int, default=0, metavar="N", help="its budget")
    parser.add_argument("--credential", metavar="FILE", help="file with a bearer token")
    parser.add_argument("--timeout", type=float, default=600.0, metavar="S", help="seconds to wait (%(default)s)")


def run(args: argparse.Namespace) -> int:
    request = _request(args)
    address = args.address or record.require(args.name).inference
    if not address:
        raise ConfigError(f"system {args.name!r} is a store alone, without workers; bring one up with --workers 1")
    from protos.concertina.inference.v1 import inference_pb2_grpc
    from services.system.wire import channel, credential

    with channel(address) as opened:
        stub = inference_pb2_grpc.InferenceServiceStub(opened)
        call = {"timeout": args.timeout, "metadata": credential(args.credential)}
        if not args.stream:
            answer = stub.Generate(request, **call)
            print(json.dumps(as_dict(answer)) if args.json else answer.text)
            return 0
        for part in stub.GenerateStream(request, **call):
            sys.stdout.write(json.dumps(as_dict(part)) + "\n" if args.json else part.text)
            sys.stdout.flush()
    if not args.json:
        print()
    return 0


def as_dict(message: Any) -> dict[str, Any]:
    """A message with the proto's own names, zeros included, a part that is absent as None.

    Numbers stay numbers; protobuf's own JSON has 64-bit ones as text.
    """
    fields = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            fields[field.name] = list(value)
        elif field.message_type:
            fields[field.name] = as_dict(value) if message.HasField(field.name) else None
        else:
            fields[field.name] = value
    return fields


def _request(args: argparse.Namespace) -> Any:
    """The message. What the worker checks is left to it; here only what cannot be put on the wire."""
    from protos.concertina.inference.v1 import inference_pb2 as pb

    if (args.text is None) == (args.tokens_file is None):
        raise ConfigError("give the prompt as TEXT, or as --tokens-file FILE")
    mode = pb.CacheMode.Value("CACHE_MODE_" + args.cache.upper().replace("-", "_"))
    try:
        request = pb.GenerateRequest(
            sampling=pb.Sampling(
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                top_p=args.top_p,
                top_k=args.top_k,
                seed=args.seed,
                stop=args.stop,
            ),
            cache=pb.CacheOptions(mode=mode),
            kv_budget=pb.KvBudget(press=args.press, tokens=args.kv_tokens),
        )
        if args.tokens_file:
            request.tokens.ids.extend(json.loads(Path(args.tokens_file).read_text()))
            request.tokens.SetInParent()
            return request
    except (OSError, TypeError, ValueError) as error:
        raise InvalidInputError(f"the request cannot be made: {error}") from error
    text = sys.stdin.read() if args.text == "-" else args.text
    if args.system:
        request.chat.messages.add(role="system", content=args.system)
    if args.chat or args.system:
        request.chat.messages.add(role="user", content=text)
    else:
        request.text = text
    return request
