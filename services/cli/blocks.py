"""``concertina blocks``: look at the blocks of a running store, and pin, evict or clear them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from typing import Any

from kvstore.errors import ConfigError, InvalidInputError
from kvstore.identity import DIGEST_BYTES
from kvstore.metadata import NodeRecord
from kvstore.settings import format_size
from services.cli.system import record
from services.cli.system.members import members

TIMEOUT_S = 30.0
PAGE = 1000


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", "pin", "unpin", "evict", "clear"))
    parser.add_argument("keys", nargs="*", metavar="KEY", help="block keys, 64 hexadecimal digits, for pin, unpin and evict")
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="system (%(default)s)")
    parser.add_argument("--redis", metavar="URL", help="cluster to ask instead, by its metadata")
    parser.add_argument("--namespace", default="", metavar="HEX", help="clear: only blocks of this namespace")
    parser.add_argument("--ttl", type=int, default=3600, metavar="S", help="pin: seconds until it ends by itself (%(default)s)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="ls: most blocks to list, 0 for all (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if bool(args.keys) != (args.action in ("pin", "unpin", "evict")):
        raise ConfigError("pin, unpin and evict take one or more KEYs; ls and clear take none")
    keys = [_digest(key, "key") for key in args.keys]
    nodes = members(args.redis or record.require(args.name).redis or "")[0]
    if args.action == "ls":
        return _list(args, nodes)
    results = [{"node": node.id, **_act(args, node, keys)} for node in nodes]
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(f"{r.pop('node')}: " + ", ".join(f"{k} {v}" for k, v in r.items()) for r in results) or "no nodes")
    return 0


def _act(args: argparse.Namespace, node: NodeRecord, keys: list[bytes]) -> dict[str, int]:
    """One node's outcome: blocks by status for named keys, what was freed for clear."""
    from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
    from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
    from services.cli.wire import channel

    with channel(node.address) as opened:
        stub = rpc.KVStoreServiceStub(opened)
        if args.action == "clear":
            request = pb.ClearRequest(namespace=_digest(args.namespace, "namespace") if args.namespace else b"")
            cleared = stub.Clear(request, timeout=TIMEOUT_S)
            return {"blocks": cleared.blocks, "freed_bytes": cleared.freed_bytes}
        if args.action == "pin":
            statuses = stub.Pin(pb.PinRequest(keys=keys, ttl_seconds=args.ttl), timeout=TIMEOUT_S).statuses
        elif args.action == "unpin":
            statuses = stub.Unpin(pb.UnpinRequest(keys=keys), timeout=TIMEOUT_S).statuses
        else:
            statuses = stub.Evict(pb.EvictRequest(keys=keys), timeout=TIMEOUT_S).statuses
    names = [pb.BlockStatus.Name(s).removeprefix("BLOCK_STATUS_").lower() for s in statuses]
    return {name: names.count(name) for name in sorted(set(names))}


def _list(args: argparse.Namespace, nodes: list[NodeRecord]) -> int:
    listed: list[dict[str, Any]] = []
    for node in nodes:
        for block in _blocks(node):
            if args.limit and len(listed) >= args.limit:
                break
            listed.append(block)
    if args.json:
        print(json.dumps(listed))
        return 0
    for b in listed:
        place = f"{b['start']}–{b['start'] + b['tokens']}"
        print(f"{b['key']}  {b['node']}  tokens {place:>11}  {format_size(b['size_bytes']):>10}  {b['fidelity']}/{b['fidelities']}"
              + ("  pinned" if b["pinned"] else ""))  # fmt: skip
    print(f"{len(listed)} of {sum(n.blocks for n in nodes)} blocks")
    return 0


def _blocks(node: NodeRecord) -> Iterator[dict[str, Any]]:
    """The node's resident blocks, page by page."""
    from protos.concertina.kvstore.v1 import kvstore_pb2 as pb
    from protos.concertina.kvstore.v1 import kvstore_pb2_grpc as rpc
    from services.cli.wire import channel

    after = b""
    with channel(node.address) as opened:
        stub = rpc.KVStoreServiceStub(opened)
        while True:
            page = stub.List(pb.ListRequest(after=after, limit=PAGE), timeout=TIMEOUT_S)
            for b in page.blocks:
                yield {
                    "node": node.id,
                    "key": b.key.hex(),
                    "namespace": b.namespace.hex(),
                    "parent": b.parent.hex(),
                    **{name: getattr(b, name) for name in ("size_bytes", "fidelity", "fidelities", "start", "tokens", "codec")},
                    **{name: getattr(b, name) for name in ("idle_seconds", "pinned")},
                }
            after = page.next
            if not after:
                return


def _digest(text: str, what: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES:
        raise InvalidInputError(f"{what} {text!r} must be {2 * DIGEST_BYTES} hexadecimal digits, as `concertina blocks ls` shows it")
    return digest
