"""Calls from Serve's proxy to replicas of the same host: real sockets, a servicer in Serve's place."""

from __future__ import annotations

import asyncio
import functools
import gc
import importlib
import os
import socket
from collections.abc import AsyncIterator

import grpc
import pytest
from grpc.aio import AioRpcError
from ray.serve.generated.serve_pb2 import ASGIRequest, ASGIResponse

from services.worker.same_host import calls, server
from services.worker.same_host.frames import HEAD, MAX_BYTES, WINDOW, Kind

DEADLINE_S = 10


class Servicer:
    """Answers with what it was asked, as often as `request_kwargs` says."""

    def __init__(self) -> None:
        self.sent, self.cancelled = 0, asyncio.Event()

    async def HandleRequestWithRejection(self, request, context) -> ASGIResponse:
        await context.send_initial_metadata([("accepted", "1"), ("num_ongoing_requests", "3")])
        if request.request_args == b"never":
            try:
                await asyncio.Event().wait()
            finally:
                self.cancelled.set()
        if request.request_args == b"fail":
            raise RuntimeError("broken")
        return ASGIResponse(serialized_message=request.request_args)

    async def HandleRequestWithRejectionStreaming(self, request, context) -> AsyncIterator[ASGIResponse]:
        await context.send_initial_metadata([("accepted", "1"), ("num_ongoing_requests", "3")])
        try:
            for _ in range(int(request.request_kwargs)):
                yield ASGIResponse(serialized_message=request.request_args)
                self.sent += 1
        finally:
            self.cancelled.set()


class Distant:
    """A stub over gRPC, of which only the name of the method counts."""

    def HandleRequest(self, request: ASGIRequest) -> str:
        return "over gRPC"


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request, tmp_path):
    """Run ``test(servicer, stub)`` on a server of its own, with a deadline, in the loop of a test and in that of Serve."""
    make = importlib.import_module(request.param).new_event_loop
    return functools.partial(run_in, make, tmp_path / "replica")


def run_in(make, path, test) -> None:
    """See `run`."""

    async def whole() -> None:
        servicer = Servicer()
        opened = server.listen(servicer, path)
        assert path.stat().st_mode & 0o777 == 0o600
        stub = calls.Stub(path, Distant)
        async with asyncio.timeout(DEADLINE_S):
            await test(servicer, stub)
        if stub._line:
            stub._line._transport.abort()
        (await opened).close()

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(whole())


def test_a_call_has_its_answer_and_says_at_once_that_it_was_accepted(run):
    async def test(servicer, stub) -> None:
        ended = []
        call = stub.HandleRequestWithRejection(ASGIRequest(request_args=b"x" * 3_000_000))
        call.add_done_callback(ended.append)
        await call.wait_for_connection()
        metadata = await call.initial_metadata()
        assert (metadata.get("accepted"), metadata.get("num_ongoing_requests")) == ("1", "3")
        assert (await call).serialized_message == (await call).serialized_message == b"x" * 3_000_000
        assert ended == [call] and await call.code() is grpc.StatusCode.OK
        assert not call.cancel()
        call.add_done_callback(ended.append)
        assert len(ended) == 2

    run(test)


def test_calls_at_once_have_each_its_own_answer(run):
    async def test(servicer, stub) -> None:
        texts = [str(number).encode() * 100 for number in range(50)]
        answers = await asyncio.gather(*(stub.HandleRequestWithRejection(ASGIRequest(request_args=text)) for text in texts))
        assert [answer.serialized_message for answer in answers] == texts

        async def one(number: int) -> int:
            request = ASGIRequest(request_args=str(number).encode(), request_kwargs=b"20")
            return sum([int(m.serialized_message) async for m in stub.HandleRequestWithRejectionStreaming(request)])

        assert await asyncio.gather(*(one(n) for n in range(10))) == [20 * n for n in range(10)]

    run(test)


def test_a_stream_waits_for_its_reader(run):
    async def test(servicer, stub) -> None:
        call = stub.HandleRequestWithRejectionStreaming(ASGIRequest(request_args=b"m", request_kwargs=b"500"))
        messages = call.__aiter__()
        await anext(messages)
        for _ in range(100):
            await asyncio.sleep(0.002)
        assert servicer.sent == WINDOW  # what the reader did not take is not computed ahead
        assert 1 + len([m async for m in messages]) == 500 == servicer.sent

    run(test)


@pytest.mark.parametrize("method", ["HandleRequestWithRejection", "HandleRequestWithRejectionStreaming"])
def test_who_stops_waiting_has_the_replica_stop(run, method):
    async def test(servicer, stub) -> None:
        call = getattr(stub, method)(ASGIRequest(request_args=b"never", request_kwargs=b"1000"))
        await call.initial_metadata()

        async def read() -> None:
            if method.endswith("Streaming"):
                async for _ in call:
                    await asyncio.sleep(60)
            await call

        reader = asyncio.create_task(read())
        await asyncio.sleep(0.05)
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader
        call.cancel()  # Serve does, where the caller of a stream has gone
        await servicer.cancelled.wait()
        with pytest.raises(asyncio.CancelledError):
            await call if not method.endswith("Streaming") else await anext(call.__aiter__())

    run(test)


def test_a_servicer_that_fails_is_an_error_of_the_call(run):
    async def test(servicer, stub) -> None:
        with pytest.raises(AioRpcError, match="broken") as caught:
            await stub.HandleRequestWithRejection(ASGIRequest(request_args=b"fail"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert (await stub.HandleRequestWithRejection(ASGIRequest(request_args=b"next"))).serialized_message == b"next"

    run(test)


def test_a_replica_that_is_gone_is_unavailable_and_then_called_over_grpc(run):
    async def test(servicer, stub) -> None:
        call, other = (stub.HandleRequestWithRejection(ASGIRequest(request_args=b"never")) for _ in range(2))
        call.add_done_callback(lambda _: other.cancel())
        await call.initial_metadata()
        line = stub._line
        stub._path.unlink()
        line._transport.abort()
        with pytest.raises(AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE and caught.value.initial_metadata().get("accepted") is None
        assert stub.HandleRequest(ASGIRequest()) == "over gRPC"
        await servicer.cancelled.wait()

    run(test)


def test_a_replica_elsewhere_is_called_over_grpc(tmp_path):
    async def test() -> str:
        return calls.Stub(tmp_path / "nobody", Distant).HandleRequest(ASGIRequest())

    assert asyncio.run(test()) == "over gRPC"


def test_neither_side_talks_to_another_user(run, monkeypatch):
    async def test(servicer, stub) -> None:
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
        assert stub.HandleRequest(ASGIRequest()) == "over gRPC"
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.setblocking(False)
            stranger.connect(str(stub._path))
            assert await asyncio.get_running_loop().sock_recv(stranger, 1) == b""

    run(test)


@pytest.mark.parametrize("frame", [HEAD.pack(MAX_BYTES + 1, 0, 0), HEAD.pack(0, 0, 99), HEAD.pack(1, 7, Kind.HandleRequest) + b"\xff"])
def test_what_is_no_call_harms_nobody_else(run, frame):
    async def test(servicer, stub) -> None:
        with socket.socket(socket.AF_UNIX) as peer:
            peer.setblocking(False)
            peer.connect(str(stub._path))
            loop = asyncio.get_running_loop()
            await loop.sock_sendall(peer, frame)
            heard = await loop.sock_recv(peer, 1000)
            assert heard == b"" or HEAD.unpack_from(heard)[1:] == (7, Kind.FAILED)
        assert (await stub.HandleRequestWithRejection(ASGIRequest(request_args=b"x"))).serialized_message == b"x"

    run(test)


def test_a_call_leaves_nothing_behind(run):
    async def test(servicer, stub) -> None:
        for _ in range(20):
            await stub.HandleRequestWithRejection(ASGIRequest(request_args=b"x"))
        assert not stub._line._calls
        gc.collect()
        guests = [o for o in gc.get_objects() if isinstance(o, server.Guest) and o._servicer is servicer]
        assert guests and not any(g._calls for g in guests)

    run(test)
