from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class BlockStatus(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    BLOCK_STATUS_UNSPECIFIED: _ClassVar[BlockStatus]
    BLOCK_STATUS_OK: _ClassVar[BlockStatus]
    BLOCK_STATUS_NOT_FOUND: _ClassVar[BlockStatus]
    BLOCK_STATUS_RESOURCE_EXHAUSTED: _ClassVar[BlockStatus]
    BLOCK_STATUS_DATA_LOSS: _ClassVar[BlockStatus]
    BLOCK_STATUS_ALREADY_EXISTS: _ClassVar[BlockStatus]
    BLOCK_STATUS_BUSY: _ClassVar[BlockStatus]
BLOCK_STATUS_UNSPECIFIED: BlockStatus
BLOCK_STATUS_OK: BlockStatus
BLOCK_STATUS_NOT_FOUND: BlockStatus
BLOCK_STATUS_RESOURCE_EXHAUSTED: BlockStatus
BLOCK_STATUS_DATA_LOSS: BlockStatus
BLOCK_STATUS_ALREADY_EXISTS: BlockStatus
BLOCK_STATUS_BUSY: BlockStatus

class LookupRequest(_message.Message):
    __slots__ = ("keys", "lease_ms")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    lease_ms: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class LookupResponse(_message.Message):
    __slots__ = ("blocks", "lease_id", "incarnation")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockSummary]
    lease_id: int
    incarnation: str
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockSummary, _Mapping]]] = ..., lease_id: _Optional[int] = ..., incarnation: _Optional[str] = ...) -> None: ...

class BlockSummary(_message.Message):
    __slots__ = ("key", "status", "size_bytes", "fidelity", "fidelities", "start", "tokens", "parent", "codec", "idle_seconds", "pinned", "namespace")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    SIZE_BYTES_FIELD_NUMBER: _ClassVar[int]
    FIDELITY_FIELD_NUMBER: _ClassVar[int]
    FIDELITIES_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    IDLE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    key: bytes
    status: BlockStatus
    size_bytes: int
    fidelity: int
    fidelities: int
    start: int
    tokens: int
    parent: bytes
    codec: int
    idle_seconds: float
    pinned: bool
    namespace: bytes
    def __init__(self, key: _Optional[bytes] = ..., status: _Optional[_Union[BlockStatus, str]] = ..., size_bytes: _Optional[int] = ..., fidelity: _Optional[int] = ..., fidelities: _Optional[int] = ..., start: _Optional[int] = ..., tokens: _Optional[int] = ..., parent: _Optional[bytes] = ..., codec: _Optional[int] = ..., idle_seconds: _Optional[float] = ..., pinned: _Optional[bool] = ..., namespace: _Optional[bytes] = ...) -> None: ...

class GetRequest(_message.Message):
    __slots__ = ("keys", "max_fidelity", "input_tokens", "pack", "section")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    MAX_FIDELITY_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PACK_FIELD_NUMBER: _ClassVar[int]
    SECTION_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    max_fidelity: int
    input_tokens: int
    pack: bool
    section: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., max_fidelity: _Optional[int] = ..., input_tokens: _Optional[int] = ..., pack: _Optional[bool] = ..., section: _Optional[int] = ...) -> None: ...

class GetResponse(_message.Message):
    __slots__ = ("index", "status", "header", "payload", "more")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    status: BlockStatus
    header: bytes
    payload: bytes
    more: _containers.RepeatedCompositeFieldContainer[GetResponse]
    def __init__(self, index: _Optional[int] = ..., status: _Optional[_Union[BlockStatus, str]] = ..., header: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., more: _Optional[_Iterable[_Union[GetResponse, _Mapping]]] = ...) -> None: ...

class PutRequest(_message.Message):
    __slots__ = ("index", "header", "payload", "input_tokens", "more")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    index: int
    header: bytes
    payload: bytes
    input_tokens: int
    more: _containers.RepeatedCompositeFieldContainer[PutRequest]
    def __init__(self, index: _Optional[int] = ..., header: _Optional[bytes] = ..., payload: _Optional[bytes] = ..., input_tokens: _Optional[int] = ..., more: _Optional[_Iterable[_Union[PutRequest, _Mapping]]] = ...) -> None: ...

class PutResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[BlockStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[BlockStatus, str]]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("lease_id",)
    LEASE_ID_FIELD_NUMBER: _ClassVar[int]
    lease_id: int
    def __init__(self, lease_id: _Optional[int] = ...) -> None: ...

class ReleaseResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("keys", "ttl_seconds")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_SECONDS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    ttl_seconds: int
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ..., ttl_seconds: _Optional[int] = ...) -> None: ...

class PinResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[BlockStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[BlockStatus, str]]] = ...) -> None: ...

class UnpinRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class UnpinResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[BlockStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[BlockStatus, str]]] = ...) -> None: ...

class EvictRequest(_message.Message):
    __slots__ = ("keys",)
    KEYS_FIELD_NUMBER: _ClassVar[int]
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    def __init__(self, keys: _Optional[_Iterable[bytes]] = ...) -> None: ...

class EvictResponse(_message.Message):
    __slots__ = ("statuses",)
    STATUSES_FIELD_NUMBER: _ClassVar[int]
    statuses: _containers.RepeatedScalarFieldContainer[BlockStatus]
    def __init__(self, statuses: _Optional[_Iterable[_Union[BlockStatus, str]]] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ("namespace",)
    NAMESPACE_FIELD_NUMBER: _ClassVar[int]
    namespace: bytes
    def __init__(self, namespace: _Optional[bytes] = ...) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("blocks", "freed_bytes")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREED_BYTES_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    freed_bytes: int
    def __init__(self, blocks: _Optional[int] = ..., freed_bytes: _Optional[int] = ...) -> None: ...

class ListRequest(_message.Message):
    __slots__ = ("after", "limit")
    AFTER_FIELD_NUMBER: _ClassVar[int]
    LIMIT_FIELD_NUMBER: _ClassVar[int]
    after: bytes
    limit: int
    def __init__(self, after: _Optional[bytes] = ..., limit: _Optional[int] = ...) -> None: ...

class ListResponse(_message.Message):
    __slots__ = ("blocks", "next")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[BlockSummary]
    next: bytes
    def __init__(self, blocks: _Optional[_Iterable[_Union[BlockSummary, _Mapping]]] = ..., next: _Optional[bytes] = ...) -> None: ...

class StatsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StatsResponse(_message.Message):
    __slots__ = ("node", "incarnation", "device", "arena_bytes", "used_bytes", "free_bytes", "reserved_bytes", "blocks", "raw_bytes", "stored_bytes", "evictions", "demotions", "leases", "pinned", "page_bytes", "spill_bytes", "spill_used_bytes", "spilled_blocks")
    NODE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    ARENA_BYTES_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_BYTES_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RAW_BYTES_FIELD_NUMBER: _ClassVar[int]
    STORED_BYTES_FIELD_NUMBER: _ClassVar[int]
    EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILL_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILL_USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SPILLED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    node: str
    incarnation: str
    device: str
    arena_bytes: int
    used_bytes: int
    free_bytes: int
    reserved_bytes: int
    blocks: int
    raw_bytes: int
    stored_bytes: int
    evictions: int
    demotions: int
    leases: int
    pinned: int
    page_bytes: int
    spill_bytes: int
    spill_used_bytes: int
    spilled_blocks: int
    def __init__(self, node: _Optional[str] = ..., incarnation: _Optional[str] = ..., device: _Optional[str] = ..., arena_bytes: _Optional[int] = ..., used_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ..., reserved_bytes: _Optional[int] = ..., blocks: _Optional[int] = ..., raw_bytes: _Optional[int] = ..., stored_bytes: _Optional[int] = ..., evictions: _Optional[int] = ..., demotions: _Optional[int] = ..., leases: _Optional[int] = ..., pinned: _Optional[int] = ..., page_bytes: _Optional[int] = ..., spill_bytes: _Optional[int] = ..., spill_used_bytes: _Optional[int] = ..., spilled_blocks: _Optional[int] = ...) -> None: ...
