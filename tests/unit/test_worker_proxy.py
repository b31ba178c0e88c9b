"""What stands before Serve's proxy: errors with details, deadlines, prefixes; and the choice of a replica."""

from __future__ import annotations

import asyncio
import copy
import json
from types import SimpleNamespace

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from ray.serve._private.proxy_request_response import ResponseStatus, gRPCStreamingType
from ray.serve.request_router import RequestRouter

from kvstore.errors import CapacityError, InvalidInputError, TransportError
from protos.concertina.inference.v1 import inference_pb2 as pb
from services.worker import proxy
from services.worker.faults import Details, describe
from services.worker.prefixes import LINK_BYTES, MAX_LINKS, Memory, trail
from services.worker.router import MAX_LEAD, PrefixRouter
from services.worker.service import TIMEOUT_HEADER


class Context:
    """As much of gRPC's context as is used."""

    def __init__(self, left_s: float | None = None) -> None:
        self.left_s, self.status, self.said, self.trailer = left_s, 0, "", ()

    def time_remaining(self):
        return self.left_s

    def invocation_metadata(self):
        return (("mine", "x"),)

    def trailing_metadata(self):
        return self.trailer

    def set_trailing_metadata(self, metadata):
        self.trailer = metadata

    def code(self):
        return self.status

    def set_code(self, code):
        self.status = code

    def details(self):
        return self.said

    def set_details(self, details):
        self.said = details

    def auth_context(self):
        return {}

    def peer(self):
        return "ipv4:127.0.0.1:1"

    def peer_identities(self):
        return None

    peer_identity_key = peer_identities


def front(code, details, parts=(), streamed=True):
    """Our handler around one of Serve's that sends `parts` and then ends with `code` and `details`."""

    class Serve:
        def service_handler_factory(self, service_method, streaming_type):
            async def stream(request, context):
                for part in parts:
                    yield part.SerializeToString()
                context.set_code(code)
                context.set_details(details)

            return stream

        async def proxy_request(self, asked):
            assert (asked.service_method, asked.stream) == ("/s/m", False)
            for part in parts:
                yield part.SerializeToString()
            yield ResponseStatus(code, message=details)

    kind = gRPCStreamingType.UNARY_STREAM if streamed else gRPCStreamingType.UNARY_UNARY
    return proxy._front(Serve().service_handler_factory)(service_method="/s/m", streaming_type=kind)


async def call(handler, context, streamed=True) -> Context:
    request = pb.GenerateRequest(text="x")
    if streamed:
        async for _ in handler(request, context):
            pass
    else:
        await handler(request, context)
    return context


def unpack(context: Context, kind):
    status = status_pb2.Status.FromString(dict(context.trailer)["grpc-status-details-bin"])
    assert status.code == context.status.value[0] and status.message == context.said
    return next((made for part in status.details if part.Unpack(made := kind())), None)


@pytest.mark.parametrize("streamed", [False, True])
async def test_details_of_a_replica_become_trailing_metadata(streamed):
    code, details = describe(CapacityError("full"), 7.5)
    context = await call(front(grpc.StatusCode[code], details, streamed=streamed), Context(), streamed)
    assert (context.status, context.said) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
    assert unpack(context, error_details_pb2.ErrorInfo).reason == "NO_CAPACITY"
    assert unpack(context, error_details_pb2.RetryInfo).retry_delay.ToMilliseconds() == 7500


async def test_what_cannot_help_again_has_no_delay():
    code, details = describe(InvalidInputError("wrong"), 7.5)
    context = await call(front(grpc.StatusCode[code], details), Context())
    assert unpack(context, error_details_pb2.RetryInfo) is None


async def test_a_lost_replica_says_how_to_go_on():
    parts = [pb.GenerateChunk(tokens=[1, 2]), pb.GenerateChunk(tokens=[3])]
    context = await call(front(grpc.StatusCode.INTERNAL, "The actor died", parts), Context())
    assert context.status is grpc.StatusCode.UNAVAILABLE and "resume" in context.said
    info = unpack(context, error_details_pb2.ErrorInfo)
    assert info.reason == proxy.LOST_REASON and info.metadata["tokens_sent"] == "3"


async def test_an_error_inside_a_replica_stays_one():
    code, details = describe(RuntimeError("secret"))
    context = await call(front(grpc.StatusCode[code], details), Context())
    assert context.status is grpc.StatusCode.INTERNAL and "secret" not in context.said


async def test_serves_own_refusal_has_a_delay_too():
    context = await call(front(grpc.StatusCode.RESOURCE_EXHAUSTED, "backpressure"), Context())
    assert unpack(context, error_details_pb2.RetryInfo).retry_delay.seconds >= 1


async def test_success_carries_nothing():
    assert (await call(front(grpc.StatusCode.OK, ""), Context())).trailer == ()


def test_a_deadline_and_a_prefix_are_handed_on():
    seen = dict(proxy.Call(Context(1.5), pb.GenerateRequest(text="y" * 3000)).invocation_metadata())
    assert seen["mine"] == "x" and seen[TIMEOUT_HEADER] == "1500" and seen["session_id"].count(",") == 1
    assert TIMEOUT_HEADER not in dict(proxy.Call(Context(), pb.GetModelInfoRequest()).invocation_metadata())


def test_details_survive_the_way_from_a_replica_to_the_proxy():
    assert vars(copy.copy(describe(TransportError("away"))[1])) == {"reason": "UNAVAILABLE", "retry_s": 1.0}
    assert isinstance(copy.deepcopy(Details("a", "B")), Details)


@pytest.mark.parametrize(("status", "expected"), [(500, 503), (503, 503), (429, 429), (408, 504)])
def test_http_that_no_replica_answered_has_openais_shape(status, expected):
    start, body = proxy.last_words(SimpleNamespace(code=status, message="m", headers=None), False)
    error = json.loads(body["body"])["error"]
    assert start["status"] == expected and set(error) == {"message", "type", "param", "code"}


def test_a_stream_that_broke_off_ends_with_an_error_event():
    (last,) = proxy.last_words(SimpleNamespace(code=500, message="m", headers=None), True)
    assert last["body"].startswith(b"data: {") and last["more_body"] is False
    assert proxy.last_words(SimpleNamespace(code=499, message="left", headers=None), True) == []


def test_a_trail_has_a_link_for_each_kibibyte_and_is_bounded():
    short, long = trail(pb.GenerateRequest(text="a" * 1000)), trail(pb.GenerateRequest(text="a" * 100_000))
    assert short == "" and len(long.split(",")) == MAX_LINKS
    one = trail(pb.GenerateRequest(text="a" * LINK_BYTES + "b" * LINK_BYTES))
    other = trail(pb.GenerateRequest(text="a" * LINK_BYTES + "c" * LINK_BYTES))
    assert one.split(",")[0] == other.split(",")[0] and one.split(",")[1] != other.split(",")[1]
    assert trail(pb.GenerateRequest(tokens=pb.TokenIds(ids=range(600)))).count(",") == 1
    messages = [pb.ChatMessage(role="user", content="a" * 2000)]
    assert trail(pb.GenerateRequest(chat=pb.ChatPrompt(messages=messages)))


def test_memory_gives_the_holder_of_the_longest_beginning_and_forgets_the_oldest():
    memory: Memory[str] = Memory(limit=3)
    memory.note("a,ab", "first")
    memory.note("a,ac", "second")
    assert memory.holder("a,ab,abx") == "first" and memory.holder("a,ad") == "second" and memory.holder("z") is None
    memory.note("q", "third")
    assert memory.holder("ac") is None and memory.holder("ab") == "first"


def router(lengths: dict[str, int]) -> tuple[PrefixRouter, list]:
    made = object.__new__(PrefixRouter)
    made.initialize_state()
    replicas = [SimpleNamespace(replica_id=name, max_ongoing_requests=8) for name in lengths]
    made._replicas = {r.replica_id: r for r in replicas}
    made._replica_queue_len_cache = lengths
    made._pending_requests_to_fulfill = []
    made.apply_locality_routing = lambda pending_request: set(lengths)
    return made, replicas


def pending(session: str) -> SimpleNamespace:
    return SimpleNamespace(metadata=SimpleNamespace(session_id=session))


def first_choice(made: PrefixRouter, replicas: list, session: str) -> list:
    return asyncio.run(made.choose_replicas(replicas, pending(session)))[0]


def test_the_router_goes_back_to_the_holder_until_it_has_too_much_to_do():
    lengths = {"a": 0, "b": 0, "c": 0}
    made, replicas = router(lengths)
    assert len(first_choice(made, replicas, "p")) == 2
    made.on_request_routed(pending("p,pq"), "b", None)
    assert [r.replica_id for r in first_choice(made, replicas, "p,pz")] == ["b"]
    lengths["b"] = MAX_LEAD + 1
    assert len(first_choice(made, replicas, "p,pz")) == 2
    assert len(first_choice(made, replicas[:1], "p,pz")) == 2


async def test_a_replica_is_chosen_at_once_only_where_it_is_known_to_have_room_and_nobody_waits(monkeypatch):
    slowly = []

    async def by_a_task(self, pending_request, *, is_retry=False):
        slowly.append(pending_request)

    monkeypatch.setattr(RequestRouter, "_choose_replica_for_request", by_a_task)
    lengths = {"a": 3, "b": 8}
    made, _ = router(lengths)
    for _ in range(8):
        assert (await made._choose_replica_for_request(pending("p"))).replica_id == "a"
    made.on_request_routed(pending("p,pq"), "b", None)
    lengths |= {"a": 7, "b": 7}
    assert (await made._choose_replica_for_request(pending("p,pz"))).replica_id == "b"
    assert not slowly
    await made._choose_replica_for_request(pending("p"), is_retry=True)
    made._pending_requests_to_fulfill = ["one"]
    await made._choose_replica_for_request(pending("p"))
    made._pending_requests_to_fulfill = []
    for full in ({"a": 8, "b": 8}, {"a": None, "b": 8}):
        lengths |= full
        await made._choose_replica_for_request(pending("p"))
    assert len(slowly) == 4
