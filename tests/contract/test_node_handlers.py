"""The tables of the node against the service's descriptor."""

from __future__ import annotations

import pytest

from kvstore.node.config import MAX_KEYS
from kvstore.node.handlers import HANDLERS, handler_class
from kvstore.node.status import Status
from protos.concertina.kvstore.v1 import kvstore_pb2 as pb

METHODS = pb.DESCRIPTOR.services_by_name["KVStoreService"].methods_by_name


def test_every_rpc_has_a_handler_and_no_other() -> None:
    assert set(HANDLERS) == set(METHODS)


@pytest.mark.parametrize("rpc", HANDLERS)
def test_a_handler_takes_its_rpcs_message_and_shape(rpc: str) -> None:
    cls, method = handler_class(rpc), METHODS[rpc]
    assert cls.request_type.DESCRIPTOR is method.input_type
    handler = cls.register(None)
    assert (handler.request_streaming, handler.response_streaming) == (method.client_streaming, method.server_streaming)


def test_statuses_are_those_of_the_wire() -> None:
    wire = {name.removeprefix("BLOCK_STATUS_"): number for name, number in pb.BlockStatus.items()}
    assert wire.pop("UNSPECIFIED") == 0
    assert wire == {status.name: status.value for status in Status}


def test_the_bound_on_keys_is_the_documented_one() -> None:
    assert MAX_KEYS == 65_536
