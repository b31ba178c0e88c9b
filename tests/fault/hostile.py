"""What a hostile or broken peer may send: random bytes, damaged messages, impossible sizes. ``python -m tests.fault.hostile`` runs it long.

Whatever comes in, the answer is a status that names the caller's fault, never INTERNAL; memory stays bounded, and the node well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import grpc

from kvstore import door
from kvstore.client.frames import put_messages
from kvstore.client.transport import SERVICE
from kvstore.node import NodeConfig, StoreNode
from kvstore.node.handlers import HANDLERS
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

from .blocks import chain

#: Bytes that a connection over HTTP/2 begins with, and kinds and flags of its frames (RFC 9113).
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, END_STREAM, END_HEADERS = 0, 1, 4, 1, 4
#: Statuses that an answer to nonsense may have.
ALLOWED = {"OK", "INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "DATA_LOSS", "UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED"}
CALL_S = 5.0


def raw_call(path: bytes) -> bytes:
    """What a connection sends that makes one empty call, whatever is in the path. Headers are literals (RFC 7541)."""

    def text(value: bytes) -> bytes:
        return bytes([len(value)]) + value

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return len(body).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + body

    post_over_http, named, path_is, host_is = b"\x83\x86", b"\x00", b"\x04", b"\x01"
    headers = post_over_http + path_is + text(path) + host_is + text(b"node")
    for name, value in ((b"content-type", b"application/grpc"), (b"te", b"trailers")):
        headers += named + text(name) + text(value)
    empty = bytes(5)
    call = frame(HEADERS, END_HEADERS, 1, headers) + frame(DATA, END_STREAM, 1, empty)
    return PREFACE + frame(SETTINGS, 0, 0, b"") + call


#: A call whose path is no text: gRPC's asynchronous server ends for it (seen up to 1.85).
NO_TEXT = raw_call(SERVICE.encode() + b"\xef")


class Fuzz:
    """Messages for each entrance of a node, drawn from a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._blocks = chain(1, 3, 5000)
        self.puts = list(put_messages((block, 12) for block in self._blocks))
        self._keys = [block.header.key for block in self._blocks]

    def unary(self, rpc: str) -> bytes:
        """A request of `rpc`: near a valid one, or nothing like it."""
        rng, kind = self.rng, getattr(pb, f"{rpc}Request")
        message = kind()
        for field in kind.DESCRIPTOR.fields:
            if rng.random() < 0.7:
                self._fill(message, field)
        return self.damaged(message.SerializeToString())

    def _fill(self, message, field) -> None:
        rng = self.rng
        values = {
            field.TYPE_BYTES: lambda: rng.choice((*self._keys, b"", rng.randbytes(rng.choice((1, 31, 32, 33, 5000))))),
            field.TYPE_STRING: lambda: rng.choice(("", "x" * 4000)),
            field.TYPE_BOOL: lambda: rng.random() < 0.5,
            field.TYPE_UINT32: lambda: rng.choice((0, 1, 2, 60_000, 2**31, 2**32 - 1)),
            field.TYPE_UINT64: lambda: rng.choice((0, 1, 2**63, 2**64 - 1)),
        }
        make = values.get(field.type)
        if make is None:
            return
        if field.is_repeated:
            getattr(message, field.name).extend(make() for _ in range(rng.choice((0, 1, 3, 200))))
        else:
            setattr(message, field.name, make())

    def damaged(self, message: bytes) -> bytes:
        """`message` as it is, with changed bits, cut, repeated, with an impossible length in it, or replaced by noise."""
        rng = self.rng
        data = bytearray(message)
        for _ in range(rng.choice((0, 0, 1, 3, 20))):
            if data:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        at = rng.randrange(len(data) + 1)
        huge = b"\x1a" + b"\xff" * rng.randrange(1, 12) + b"\x7f"
        return bytes(rng.choice((data, data, data[:at], data + data[at:], data[:at] + huge + data[at:], rng.randbytes(rng.randrange(300)))))

    def stream(self) -> list[bytes]:
        """The messages of a Put: damaged, out of order, twice, or fewer."""
        messages = [self.damaged(message) for message in self.puts * self.rng.choice((1, 2))]
        self.rng.shuffle(messages)
        return messages[: self.rng.randrange(len(messages) + 1)]

    def connection(self) -> bytes:
        """What a connection sends that makes a call and is damaged behind its preface."""
        call = raw_call(SERVICE.encode() + self.rng.choice(list(HANDLERS)).encode())
        return PREFACE + self.damaged(call[len(PREFACE) :])

    def guest(self) -> bytes:
        """What a guest of the door says: a valid beginning, then damaged messages."""
        rng, number = self.rng, door.NUMBER.pack(self.rng.choice((0, 7, 2**32 - 1)))
        put = [door.message(door.Kind.PUT, number, self._blocks[0].header.to_bytes()), *map(bytes, self._blocks[0].payload)]
        messages = [
            door.message(door.Kind.PLAN, number, *self._keys),
            door.message(door.Kind.GET, number, *self._keys),
            door.message(door.Kind.SECTION, bytes([rng.randrange(8)]), number, *self._keys),
            door.message(door.Kind.DONE, number),
            b"".join(put),
            door.message(door.Kind.END),
            door.message(door.Kind.STATUSES),
            door.FRAME.pack(2**32 - 1, 7),
        ]
        hello = door.message(door.Kind.HELLO, b"")
        return rng.choice((hello, hello, hello, b"", self.damaged(hello))) + b"".join(self.damaged(rng.choice(messages)) for _ in range(4))


class Assault:
    """Fuzzed calls against one node. `answers` counts statuses by RPC."""

    def __init__(self, node: StoreNode, seed: int) -> None:
        self.fuzz = Fuzz(seed)
        self.answers: Counter[tuple[str, str]] = Counter()
        self._node = node
        self._channel = grpc.aio.insecure_channel(node.address)

    async def close(self) -> None:
        await self._channel.close()

    async def round(self) -> None:
        """One call of every RPC and one guest at the door, side by side."""
        await asyncio.gather(*(self._call(rpc) for rpc in HANDLERS), self._guest())

    @property
    def forbidden(self) -> dict[str, int]:
        """Answers that must not be."""
        return {f"{rpc} {status}": count for (rpc, status), count in self.answers.items() if status not in ALLOWED}

    async def _call(self, rpc: str) -> None:
        path = SERVICE + rpc
        try:
            if rpc == "Put":
                await self._channel.stream_unary(path)(_each(self.fuzz.stream()), timeout=CALL_S)
            elif rpc == "Get":
                async for _ in self._channel.unary_stream(path)(self.fuzz.unary(rpc), timeout=CALL_S):
                    pass
            else:
                await self._channel.unary_unary(path)(self.fuzz.unary(rpc), timeout=CALL_S)
            status = "OK"
        except grpc.aio.AioRpcError as error:
            status = error.code().name
        self.answers[rpc, status] += 1

    async def _guest(self) -> None:
        host, _, port = self._node.record.door.rpartition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(self.fuzz.guest())
            await writer.drain()
            writer.write_eof()
            async with asyncio.timeout(CALL_S):
                while await reader.read(1 << 16):
                    pass
            self.answers["door", "OK"] += 1
        except OSError:
            self.answers["door", "UNAVAILABLE"] += 1
        finally:
            writer.transport.abort()


def _each(messages: Sequence[bytes]) -> Iterator[bytes]:
    yield from messages


async def _run(seconds: float, seed: int) -> Counter[tuple[str, str]]:
    node = StoreNode(NodeConfig(arena=8 << 20))
    await node.start()
    assault, ends = Assault(node, seed), time.monotonic() + seconds
    while time.monotonic() < ends:
        await assault.round()
        node.engine.check()
    await assault.close()
    await node.stop()
    return assault.answers


def main() -> int:
    """Exit status 1 if the node answered anything with INTERNAL."""
    parser = argparse.ArgumentParser(prog="python -m tests.fault.hostile", description=main.__doc__)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    answers = asyncio.run(_run(args.seconds, args.seed))
    print(json.dumps({f"{rpc} {status}": count for (rpc, status), count in sorted(answers.items())}))
    return int(any(status not in ALLOWED for _, status in answers))


if __name__ == "__main__":
    sys.exit(main())
