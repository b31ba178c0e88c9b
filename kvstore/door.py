"""The door: a node's second entrance, for blocks alone, beside gRPC (whose own cost per byte is above that of moving the bytes).

A node listens on a Unix socket for readers of its own user on its own host, whom it hands its shared memory, and on a TCP port for all
others. Either way a connection begins with the credential that a gRPC call would carry, and what it may see is the same. Whatever goes
wrong here, the client goes back to gRPC.

Every message is ``body bytes u32 | kind u8 | body``, little-endian::

    client                          node
    HELLO  token                    WELCOME  bytes u64 of the memory that is shared, 0 for none; else with its descriptor: the arena and
                                    its marks, or the marks alone, with the name of the GPU's memory that the arena is
                                    LISTED after a WELCOME with the arena: bytes u64 of its catalogue
                                    (`kvstore.arena.catalogue`), with its descriptor
    PLAN   tokens u32 | keys        PLANNED  number u32 | for each key: status u8 | header u16 | runs u32 | mark u64 | state u64
                                    | header | RUNs
    DONE   number u32               none
    USED   tokens u32 | keys        none: these were copied by what the catalogue says
    GET    tokens u32 | keys        BLOCK    status u8 | header; then the payload; then INTACT or LOST; a message for each key
    SECTION  section u8 | tokens u32 | keys  as GET, of each block the header and this section alone, from 0 on: see `kvstore.block`
    PUT    tokens u32 | header; then the payload
    END                             STATUSES a status u8 for each PUT since the last END
    STAGE                           STAGED   bytes u64 of memory that both may now see and the client writes, 0 if there is none; else with
                                    its descriptor; on the Unix socket only
    OFFER  OFFERs, each with its header      none: the payloads are about to lie in that memory, and the headers can be read meanwhile
    PART                                     none: the payloads of the last OFFER are there, and another OFFER follows
    FILLED                                   STATUSES a status u8 for each block that ends there, since the last ones: those of the last
                                    OFFER are there, too

A RUN is ``offset u64 | bytes u64`` in the arena. What is copied from it is the block's if the 8 bytes at ``mark`` still are ``state`` after
the copy; DONE ends the lease under which that is to be expected. Few bytes are copied without one, by what the catalogue says, and USED
says so afterwards. An OFFER is ``tokens u32 | offset u64 | bytes u64 | header bytes u16``,
of which the last may be the beginning of a block, and the first, without a header, what follows the beginning in the OFFER before.
A refused HELLO, and any message that is none of these, ends the connection.
"""

from __future__ import annotations

import struct
from enum import IntEnum

from .errors import TransportError

FRAME = struct.Struct("<IB")
NUMBER = struct.Struct("<I")
ARENA = struct.Struct("<Q")
PLANNED = struct.Struct("<BHIQQ")
RUN = struct.Struct("<QQ")
OFFER = struct.Struct("<IQQH")
KEY_BYTES = 32
#: Room for the name of a GPU's memory.
MAX_REMOTE_BYTES = 256
#: The longest request: 65,536 keys.
MAX_REQUEST_BYTES = NUMBER.size + 65_536 * KEY_BYTES
#: The longest answer that a client reads.
MAX_ANSWER_BYTES = 32 << 20
#: After the payload of a block that was sent: whether all of it was the block's.
INTACT, LOST = b"\x01", b"\x00"


class Kind(IntEnum):
    """What a message is."""

    HELLO = 1
    WELCOME = 2
    PLAN = 3
    PLANNED = 4
    DONE = 5
    GET = 6
    BLOCK = 7
    PUT = 8
    END = 9
    STATUSES = 10
    STAGE = 11
    STAGED = 12
    OFFER = 13
    FILLED = 14
    SECTION = 15
    PART = 16
    LISTED = 17
    USED = 18


def message(kind: Kind, *parts: bytes) -> bytes:
    """A whole message."""
    return b"".join((FRAME.pack(sum(map(len, parts)), kind), *parts))


def parse_frame(frame: bytes, limit: int) -> tuple[Kind, int]:
    """Kind and body bytes of a message. Raises TransportError for one that is none, or longer than `limit`."""
    size, kind = FRAME.unpack(frame)
    if size > limit or kind not in Kind._value2member_map_:
        raise TransportError(f"a door's message of kind {kind} with {size} bytes")
    return Kind(kind), size


def split_keys(body: memoryview) -> list[bytes]:
    """The keys of a request, after its first number. Raises TransportError where they are cut short."""
    if len(body) % KEY_BYTES:
        raise TransportError("a key is cut short")
    return [bytes(body[at : at + KEY_BYTES]) for at in range(0, len(body), KEY_BYTES)]


def split_offers(body: memoryview) -> list[tuple[int, int, int, memoryview]]:
    """Tokens, offset, bytes and header of each piece of an OFFER. Raises TransportError where one is cut short."""
    offers, at = [], 0
    while at < len(body):
        if at + OFFER.size > len(body):
            raise TransportError("an offer is cut short")
        tokens, offset, size, header_bytes = OFFER.unpack_from(body, at)
        at += OFFER.size + header_bytes
        if at > len(body):
            raise TransportError("an offer is cut short")
        offers.append((tokens, offset, size, body[at - header_bytes : at]))
    return offers


def local_name(incarnation: str) -> str:
    """The abstract Unix address of a node's door."""
    return f"\0concertina-{incarnation}"
