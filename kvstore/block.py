"""The encoded block: a self-certifying run of bytes (DESIGN §4).

Layout, little-endian::

    prefix   magic "KVCB" | version u16 | header bytes u16 | CRC-32C of the rest of the header u32
    fixed    codec u16 | dtype u8 | fidelities u8 | mask u8 | flags u8 | layers u16 | kv_heads u16 | head_dim u16
             start u32 | tokens u32 | key 32 | namespace 32 | parent 32 | profile digest 32
             provenance: fidelity u8 | distortion K f32 | V f32
    a row for each fidelity, 1 = base first
             bytes u32 | CRC-32C u32 | distortion K f32 | V f32 | expected divergence f32
    sections with flag 1: CRC-32C u32 of each quarter of the model's layers
    payload  the present fidelity layers, base first, nothing between and nothing after

The rows of layers that were dropped stay, so that `truncate` changes the mask and the header's CRC and nothing else. In the
text "layer" means a layer of precision; the model's own are `layers` of the shape.

Where the payload is one layer in which the model's own follow each other, all of one size, their quarters (*sections*) certify
themselves, so that a reader can begin with the lowest while the others are under way.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from crc32c import crc32c

from .errors import CorruptBlockError, InvalidInputError
from .identity import DIGEST_BYTES, NO_PARENT

MAGIC = b"KVCB"
VERSION = 1
MAX_FIDELITIES = 8
#: Runs of the model's layers that certify themselves.
SECTIONS = 4
#: No block is larger: 1,024 tokens of a 128-layer model in float32 stay below it, and a header that claims more is refused.
MAX_BLOCK_BYTES = 1 << 31
MAX_TOKENS = 1 << 16
#: Bytes of one value in every ratio that Concertina reports, whatever the dtype (DESIGN §5).
RATIO_BYTES_PER_VALUE = 2

_PREFIX = struct.Struct("<4sHHI")
_FIXED = struct.Struct("<HBBBBHHHII32s32s32s32sBff")
_BOTH = struct.Struct(_PREFIX.format + _FIXED.format.removeprefix("<"))
_ROW = struct.Struct("<IIfff")
_SECTIONS = struct.Struct(f"<{SECTIONS}I")
_SECTIONED = 1  # flag
_FIXED_AT, _ROWS_AT, _ROW_BYTES = _PREFIX.size, _PREFIX.size + _FIXED.size, _ROW.size
MAX_HEADER_BYTES = _ROWS_AT + MAX_FIDELITIES * _ROW_BYTES + _SECTIONS.size

#: Makes a named tuple in a third of the time that its own name takes.
_tuple = tuple.__new__

Buffer = bytes | bytearray | memoryview


class Distortion(NamedTuple):
    """Relative squared error of what is stored against what was given: sum (x - x')² / sum x², K and V apart."""

    keys: float
    values: float


class LayerInfo(NamedTuple):
    """One layer of precision: its size and CRC, and the block's distortion when it is the topmost one present.

    `expected_divergence` is the profile's estimate of the harm to the model's output, in nats a token (0 when not known).
    """

    size_bytes: int
    crc32c: int
    distortion: Distortion
    expected_divergence: float = 0.0


class Provenance(NamedTuple):
    """The worst fidelity and distortion of the prefix that this block was computed on top of.

    `fidelity` 0 means an exact prefix.
    """

    fidelity: int = 0
    distortion: Distortion = Distortion(0.0, 0.0)

    @property
    def exact(self) -> bool:
        return self.distortion.keys == 0.0 and self.distortion.values == 0.0


EXACT = Provenance()


@dataclass(slots=True, unsafe_hash=True)
class BlockHeader:
    """Everything about a block but its payload. See the module's docstring for the bytes.

    Nobody changes one: it is not frozen because Python takes a third of the time of `from_bytes` to enforce that.
    """

    codec: int
    dtype: int
    layers: int
    kv_heads: int
    head_dim: int
    start: int
    tokens: int
    rows: tuple[LayerInfo, ...]
    present: int
    key: bytes = NO_PARENT
    namespace: bytes = NO_PARENT
    parent: bytes = NO_PARENT
    profile: bytes = NO_PARENT
    provenance: Provenance = EXACT
    sections: tuple[int, ...] = ()

    @property
    def payload_bytes(self) -> int:
        if self.present == 1:  # most blocks, and this is asked several times on their way
            return self.rows[0].size_bytes
        return sum(row.size_bytes for row in self.rows[: self.present])

    @property
    def divides(self) -> bool:
        """Whether the payload can be made of the model's layers, one behind the other, enough of them for sections."""
        return len(self.rows) == 1 and self.layers >= SECTIONS and self.rows[0].size_bytes % self.layers == 0

    @property
    def header_bytes(self) -> int:
        return _ROWS_AT + len(self.rows) * _ROW_BYTES + 4 * len(self.sections)

    @property
    def total_bytes(self) -> int:
        return self.header_bytes + self.payload_bytes

    @property
    def raw_bytes(self) -> int:
        """Bytes of K and V that the block stands for, at 2 bytes a value: the numerator of every ratio."""
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * RATIO_BYTES_PER_VALUE

    def check_layer(self, number: int, crc: int) -> None:
        """Raises CorruptBlockError when `crc`, of the bytes that came as layer `number`, is not the layer's."""
        if crc != self.rows[number - 1].crc32c:
            raise CorruptBlockError(f"the CRC-32C of fidelity layer {number} does not match")

    def section(self, number: int) -> tuple[int, int]:
        """Where in the payload section `number`, from 0 on, begins and ends. Without sections, number 0 is all of it."""
        if not self.sections:
            return (0, self.payload_bytes) if number == 0 else (0, 0)
        layer_bytes = self.payload_bytes // self.layers
        return self.layers_before(number) * layer_bytes, self.layers_before(number + 1) * layer_bytes

    def layers_before(self, section: int) -> int:
        """How many of the model's layers lie before a section."""
        return self.layers * section // SECTIONS

    def check_section(self, number: int, crc: int) -> None:
        """Raises CorruptBlockError when `crc`, of the bytes that came as section `number` (there are some), is not the section's."""
        if crc != self.sections[number]:
            raise CorruptBlockError(f"the CRC-32C of section {number} does not match")

    def truncate(self, fidelity: int) -> BlockHeader:
        """This header with only layers 1 … `fidelity` present. Raises InvalidInputError if they are not."""
        if not isinstance(fidelity, int) or not 1 <= fidelity <= self.present:
            raise InvalidInputError(f"fidelity {fidelity} is not among those present (1 … {self.present})")
        return replace(self, present=fidelity)

    def to_bytes(self) -> bytes:
        fixed = _FIXED.pack(
            self.codec, self.dtype, len(self.rows), (1 << self.present) - 1, _SECTIONED if self.sections else 0,
            self.layers, self.kv_heads, self.head_dim, self.start, self.tokens,
            self.key, self.namespace, self.parent, self.profile,
            self.provenance.fidelity, self.provenance.distortion.keys, self.provenance.distortion.values,
        )  # fmt: skip
        rows = b"".join([_ROW.pack(size, crc, keys, values, harm) for size, crc, (keys, values), harm in self.rows])
        rest = fixed + rows + (_SECTIONS.pack(*self.sections) if self.sections else b"")
        return _PREFIX.pack(MAGIC, VERSION, _PREFIX.size + len(rest), crc32c(rest)) + rest

    @classmethod
    def from_bytes(cls, blob: Buffer) -> BlockHeader:
        """Parse and verify the header at the start of `blob`; the payload is not looked at.

        Raises
        ------
        CorruptBlockError
            For anything but a header that `to_bytes` could have written.
        """
        view = _bytes(blob)
        if len(view) < _ROWS_AT:
            raise CorruptBlockError(f"{len(view)} bytes are too few for a block header")
        (magic, version, size, crc, codec, dtype, count, mask, flags, layers, kv_heads, head_dim, start, tokens, key, namespace, parent,
         profile, p_fidelity, p_keys, p_values) = _BOTH.unpack_from(view)  # fmt: skip
        if magic != MAGIC or version != VERSION:
            raise CorruptBlockError(f"not a block of format {VERSION}: magic {bytes(magic)!r}, version {version}")
        if size < _ROWS_AT or size > MAX_HEADER_BYTES or size > len(view):
            raise CorruptBlockError(f"header length {size} is impossible")
        if crc32c(view[_FIXED_AT:size]) != crc:
            raise CorruptBlockError("the header's CRC-32C does not match")
        present = mask.bit_length()
        if flags & ~_SECTIONED or not 1 <= count <= MAX_FIDELITIES or not 1 <= present <= count or mask != (1 << present) - 1:
            raise CorruptBlockError(f"impossible fidelity mask {mask:#x} of {count} layers")
        rows_end = _ROWS_AT + count * _ROW_BYTES
        if size != rows_end + (_SECTIONS.size if flags else 0):
            raise CorruptBlockError("header length and number of layers disagree")
        if not 1 <= tokens <= MAX_TOKENS or not layers or not kv_heads or not head_dim:
            raise CorruptBlockError(f"impossible shape [{layers}, {kv_heads}, {tokens}, {head_dim}]")
        rows = [
            _tuple(LayerInfo, (part, one, _tuple(Distortion, (k, v)), harm))
            for part, one, k, v, harm in _ROW.iter_unpack(view[_ROWS_AT:rows_end])
        ]
        provenance = Provenance(p_fidelity, Distortion(p_keys, p_values)) if p_fidelity or p_keys or p_values else EXACT
        header = cls(
            codec, dtype, layers, kv_heads, head_dim, start, tokens, tuple(rows), present, key, namespace, parent, profile,
            provenance, _SECTIONS.unpack_from(view, rows_end) if flags else (),
        )  # fmt: skip
        if flags and not header.divides:
            raise CorruptBlockError("the header claims sections of a payload that does not divide into them")
        if header.payload_bytes > MAX_BLOCK_BYTES:
            raise CorruptBlockError(f"the header claims {header.payload_bytes} payload bytes, more than {MAX_BLOCK_BYTES}")
        return header


@dataclass(slots=True, unsafe_hash=True)
class EncodedBlock:
    """A header and the payload of each present layer of precision, base first. Nobody changes one, see `BlockHeader`."""

    header: BlockHeader
    payload: tuple[Buffer, ...]

    @property
    def fidelities(self) -> tuple[int, ...]:
        """The fidelities that can be decoded, lowest first; the last one is what is here in full."""
        return tuple(range(1, self.header.present + 1))

    @property
    def distortion(self) -> dict[int, Distortion]:
        """Distortion at each present fidelity, measured when the block was encoded."""
        return {f: self.header.rows[f - 1].distortion for f in self.fidelities}

    @property
    def expected_divergence(self) -> float:
        """The profile's estimate at the present fidelity, nats a token; 0 when not known."""
        return self.header.rows[self.header.present - 1].expected_divergence

    def to_bytes(self) -> bytes:
        """Everything that is stored, metadata included."""
        return b"".join((self.header.to_bytes(), *self.payload))

    def truncate(self, fidelity: int) -> EncodedBlock:
        """Drop the layers above `fidelity`; nothing is encoded again."""
        return EncodedBlock(self.header.truncate(fidelity), self.payload[:fidelity])

    def section(self, number: int) -> tuple[Buffer, ...]:
        """The payload of a section, as `BlockHeader.section` counts them."""
        if not self.header.sections:
            return self.payload if number == 0 else ()
        return (_bytes(self.payload[0])[slice(*self.header.section(number))],)

    def with_identity(self, key: bytes, namespace: bytes, parent: bytes, provenance: Provenance | None = None) -> EncodedBlock:
        """The same payload, named. Raises InvalidInputError for a digest that is cut short."""
        if any(len(d) != DIGEST_BYTES for d in (key, namespace, parent)):
            raise InvalidInputError(f"key, namespace and parent must be {DIGEST_BYTES} bytes each")
        named = replace(self.header, key=key, namespace=namespace, parent=parent, provenance=provenance or self.header.provenance)
        return EncodedBlock(named, self.payload)

    @classmethod
    def build(cls, header: BlockHeader, payload: Sequence[Buffer], sectioned: bool = False) -> EncodedBlock:
        """Fill in the sizes and CRCs of `payload` into the header's rows (their distortions are kept).

        `sectioned`: the payload is that of the model's layers, one behind the other; its sections are to certify themselves.
        """
        rows = tuple(
            LayerInfo(memoryview(p).nbytes, crc32c(p), row.distortion, row.expected_divergence)
            for row, p in zip(header.rows, payload, strict=True)
        )
        header = replace(header, rows=rows, present=len(rows), sections=())
        if sectioned and header.divides:
            parts = cls(replace(header, sections=(0,) * SECTIONS), tuple(payload))
            header = replace(header, sections=tuple(crc32c(part) for number in range(SECTIONS) for part in parts.section(number)))
        return cls(header, tuple(payload))

    @classmethod
    def from_bytes(cls, blob: Buffer) -> EncodedBlock:
        """Parse and verify a blob. The payload is referenced, not copied.

        Raises
        ------
        CorruptBlockError
            For any bytes that are not exactly one intact block; in time and memory bounded by ``len(blob)``.
        InvalidInputError
            For what is no bytes.
        """
        header = BlockHeader.from_bytes(blob)
        return cls.verify(header, _bytes(blob)[header.header_bytes :])

    @classmethod
    def verify(cls, header: BlockHeader, payload: Buffer) -> EncodedBlock:
        """Check `payload` (all present layers, base first) against a verified header."""
        view = _bytes(payload)
        if len(view) != header.payload_bytes:
            raise CorruptBlockError(f"the payload has {len(view)} bytes, the header says {header.payload_bytes}")
        parts, at = [], 0
        for number, row in enumerate(header.rows[: header.present], 1):
            part = view[at : at + row.size_bytes]
            header.check_layer(number, crc32c(part))
            parts.append(part)
            at += row.size_bytes
        return cls(header, tuple(parts))


def _bytes(blob: Buffer) -> memoryview:
    """`blob` as bytes. Raises InvalidInputError for what has none in a row."""
    try:
        return memoryview(blob).cast("B")
    except TypeError as error:
        raise InvalidInputError(f"a block is read from bytes, not from {type(blob).__name__}") from error
