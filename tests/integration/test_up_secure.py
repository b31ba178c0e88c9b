"""A whole store under credentials, TLS and spill, brought up and looked after by the command line alone."""

from __future__ import annotations

import asyncio
import hashlib
import json
from pathlib import Path

import pytest

from kvstore.client import ClientConfig, KvClient
from kvstore.errors import TransportError
from tests.client_support import NAMESPACE, chain
from tests.system_support import Cli
from tests.tls_support import Authority, needs_openssl

NAME = "guarded"
TOKENS = {"team-a": "token of a", "operators": "token of the operators"}


@pytest.fixture
def cli(tmp_path: Path):
    authority = Authority(tmp_path / "tls")
    cert, key = authority.issue("node", "IP:127.0.0.1")
    digests = {name: hashlib.sha256(token.encode()).hexdigest() for name, token in TOKENS.items()}
    file = tmp_path / "credentials.json"
    file.write_text(json.dumps({digests["team-a"]: "team-a", digests["operators"]: {"tenant": "operators", "admin": True}}))
    for name, token in TOKENS.items():
        (tmp_path / name).write_text(token)
    one = Cli(tmp_path)
    one.environment |= {"CONCERTINA_CLIENT__TLS_CA": str(authority.ca), "CONCERTINA_CLIENT__CREDENTIAL": str(tmp_path / "operators")}
    guards = ("--credentials", str(file), "--tls-cert", cert, "--tls-key", key)
    spill = ("--spill", str(tmp_path / "spill"), "--spill-bytes", "64MiB")
    up = one.run("up", "--name", NAME, "--nodes", "2", "--workers", "0", "--arena", "4MiB", *guards, *spill)
    assert up.returncode == 0, up.stderr
    yield one
    one.run("down", "--name", NAME)


async def store(redis: str, config: dict[str, str], blocks: list) -> int:
    """Publish `blocks` and read them again. Returns how many came back."""
    client = KvClient(ClientConfig(redis_url=redis, **config))
    await client.start()
    try:
        client.publish(blocks)
        await client.flush(20)
        keys = [one.header.key for one in blocks]
        async with asyncio.timeout(10):
            while len(await client.lookup(keys)) < len(keys):
                await asyncio.sleep(0.05)
        fetched = await client.fetch(await client.lookup(keys), namespace=NAMESPACE, deadline_s=10)
        assert [one.to_bytes() for one in fetched.blocks] == [one.to_bytes() for one in blocks][: len(fetched.blocks)]
        return len(fetched.blocks)
    finally:
        await client.close()


@needs_openssl
def test_a_guarded_store_serves_who_shows_what_it_asks_for(cli: Cli, tmp_path: Path) -> None:
    blocks = chain(16, size=200_000)
    redis = cli.json("status", "--name", NAME)["redis"]
    trusted = {"tls_ca": str(tmp_path / "tls" / "ca.pem")}
    assert asyncio.run(store(redis, trusted | {"credential": str(tmp_path / "team-a")}, blocks)) == len(blocks)
    folders = sorted(path.name for path in (tmp_path / "spill").iterdir())
    assert folders == [f"{NAME}-node-0", f"{NAME}-node-1"]
    listed = cli.json("blocks", "ls", "--name", NAME, "--limit", "0")
    assert {block["key"] for block in listed} <= {one.header.key.hex() for one in blocks}
    assert listed
    assert cli.json("blocks", "clear", "--name", NAME)["blocks"] == len(blocks)

    cli.environment["CONCERTINA_CLIENT__CREDENTIAL"] = str(tmp_path / "nobody")
    (tmp_path / "nobody").write_text("not a token")
    refused = cli.run("blocks", "ls", "--name", NAME)
    assert refused.returncode == 1
    assert "not known" in refused.stderr
    with pytest.raises(TransportError):
        asyncio.run(plain_text(redis))


async def plain_text(redis: str) -> None:
    """What a client that was not told of TLS gets."""
    client = KvClient(ClientConfig(redis_url=redis, rpc_timeout_s=3.0))
    await client.start()
    try:
        await client.admin.list(client.nodes()[0])
    finally:
        await client.close()
