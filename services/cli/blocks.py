"""``concertina blocks``: look at the blocks of a running store; pin, evict or clear them; set quotas and floors of tenants."""

from __future__ import annotations

import argparse
import asyncio
import json
from typing import TYPE_CHECKING, Any

from kvstore.errors import ConfigError, InvalidInputError, TransportError
from kvstore.identity import DIGEST_BYTES
from kvstore.settings import format_size, load, parse_size
from services.system import record

if TYPE_CHECKING:
    from kvstore.client import KvClient
    from kvstore.client.admin import Admin

FIELDS = ("size_bytes", "fidelity", "fidelities", "start", "tokens", "codec", "idle_seconds", "pinned")
BY_KEY = ("pin", "unpin", "evict")
#: Settings of a tenant: the action, and the option that holds the value.
SETTINGS = {"quota": "--size", "floor": "--max-distortion"}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("ls", *BY_KEY, "clear", *SETTINGS))
    parser.add_argument("keys", nargs="*", metavar="KEY", help="block keys, 64 hexadecimal digits; a tenant or namespace for quota, floor")
    parser.add_argument("--name", default=record.DEFAULT_NAME, help="system (%(default)s)")
    parser.add_argument("--redis", metavar="URL", help="cluster to ask instead, by its metadata")
    parser.add_argument("--namespace", default="", metavar="HEX", help="clear: only blocks of this namespace")
    parser.add_argument("--ttl", type=int, default=3600, metavar="S", help="pin: seconds until it ends by itself (%(default)s)")
    parser.add_argument("--size", metavar="SIZE", help="quota: what the tenant may hold in the cluster, such as 2GiB; none lifts the quota")
    parser.add_argument(
        "--max-distortion", metavar="X", help="floor: relative error that demotion may give the tenant's blocks; none lifts the floor"
    )
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="ls: most blocks to list, 0 for all (%(default)s)")


def run(args: argparse.Namespace) -> int:
    if args.action in SETTINGS:
        option = SETTINGS[args.action]
        if len(args.keys) > 1 or bool(args.keys) != (_setting(args) is not None):
            raise ConfigError(f"{args.action} shows all {args.action}s, or sets one: blocks {args.action} TENANT {option} VALUE")
    elif bool(args.keys) != (args.action in BY_KEY):
        raise ConfigError("pin, unpin and evict take one or more KEYs; ls and clear take none")
    keys = [_digest(key, "key") for key in args.keys if args.action in BY_KEY]
    namespace = _digest(args.namespace, "--namespace") if args.namespace else None
    redis = args.redis or record.require(args.name).redis or ""
    result = asyncio.run(_act(args, redis, keys, namespace))
    print(json.dumps(result) if args.json else _text(args.action, result))
    return 0


async def _act(args: argparse.Namespace, redis: str, keys: list[bytes], namespace: bytes | None) -> Any:
    """A list of blocks for ls, counts for clear, numbers by tenant for quota and floor, one status for each key otherwise."""
    from kvstore.client import ClientConfig, KvClient

    client = KvClient(load(ClientConfig, "client", redis_url=redis))
    await client.start()
    try:
        if not client.available:
            raise TransportError(f"Redis at {redis} does not answer; is the system up?")
        if args.action == "ls":
            return await _list(client, args.limit)
        if args.action == "clear":
            blocks, freed = await client.admin.clear(namespace)
            return {"blocks": blocks, "freed_bytes": freed}
        if args.action in SETTINGS:
            return await _set(client.admin, args)
        if args.action == "pin":
            statuses = await client.admin.pin(keys, args.ttl)
        else:
            statuses = await getattr(client.admin, args.action)(keys)
        return dict(zip((key.hex() for key in keys), statuses, strict=True))
    finally:
        await client.close()


def _setting(args: argparse.Namespace) -> str | None:
    """What the option of a tenant's setting says, None where it was not given."""
    return args.size if args.action == "quota" else args.max_distortion


async def _set(admin: Admin, args: argparse.Namespace) -> dict[str, float]:
    """Set the quota or the floor that was given, if any; all of them after that."""
    text = _setting(args)
    if text is None:
        return await (admin.quotas() if args.action == "quota" else admin.floors())
    if args.action == "quota":
        return await admin.set_quota(args.keys[0], None if text == "none" else parse_size(text))
    try:
        return await admin.set_floor(args.keys[0], None if text == "none" else float(text))
    except ValueError as error:
        raise ConfigError(f"--max-distortion is a number such as 0.05, or none, not {text!r}") from error


async def _list(client: KvClient, limit: int) -> list[dict[str, Any]]:
    """Resident blocks of all nodes, page by page; `limit` 0 for all."""
    listed: list[dict[str, Any]] = []
    for node in client.admin.nodes():
        after = b""
        while not limit or len(listed) < limit:
            page = await client.admin.list(node, after)
            for block in page.blocks:
                digests = {"key": block.key.hex(), "namespace": block.namespace.hex(), "parent": block.parent.hex()}
                listed.append({"node": node.id, **digests, **{name: getattr(block, name) for name in FIELDS}})
            after = page.next
            if not after:
                break
    return listed[:limit] if limit else listed


def _text(action: str, result: Any) -> str:
    if action == "clear":
        return f"{result['blocks']} blocks dropped, {format_size(result['freed_bytes'])} freed"
    if action == "quota":
        return "\n".join(f"{subject}  {format_size(size)}" for subject, size in result.items()) or "no quotas"
    if action == "floor":
        return "\n".join(f"{subject}  {distortion:g}" for subject, distortion in result.items()) or "no floors"
    if action != "ls":
        return "\n".join(f"{key}  {status.lower().replace('_', ' ')}" for key, status in result.items())
    lines = []
    for b in result:
        place = f"{b['start']}–{b['start'] + b['tokens']}"
        line = f"{b['key']}  {b['node']}  tokens {place:>11}  {format_size(b['size_bytes']):>10}  {b['fidelity']}/{b['fidelities']}"
        lines.append(line + ("  pinned" if b["pinned"] else ""))
    return "\n".join([*lines, f"{len(result)} blocks"])


def _digest(text: str, what: str) -> bytes:
    try:
        digest = bytes.fromhex(text)
    except ValueError:
        digest = b""
    if len(digest) != DIGEST_BYTES:
        raise InvalidInputError(f"{what} {text!r} must be {2 * DIGEST_BYTES} hexadecimal digits, as `concertina blocks ls` shows it")
    return digest
