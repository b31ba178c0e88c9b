"""Where a node says that blocks lie in its shared memory, and whether what was copied from there is theirs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

from kvstore import door
from kvstore.block import BlockHeader
from kvstore.errors import CorruptBlockError

OK = 1
UNFIT = "a plan of the door does not fit its block or its arena"
CUT_SHORT = "a plan of the door is cut short"


class Planned:
    """A block in shared memory, as its node describes it.

    Parameters
    ----------
    described : bytes
        An entry of PLANNED (`kvstore.door`), whole.
    begin : int
        Where its RUNs begin.

    Raises
    ------
    CorruptBlockError
        When the runs are not those of the header, or there is no payload.
    """

    __slots__ = ("cuts", "header", "mark", "runs", "stop", "tops")

    def __init__(self, described: bytes, begin: int) -> None:
        _, _, _, *mark = door.PLANNED.unpack_from(described)
        #: Place and state of the number which says that the block still is there.
        self.mark: tuple[int, int] = tuple(mark)
        self.header = BlockHeader.from_bytes(described[door.PLANNED.size : begin])
        #: Of each copy: its place in the payload, its place in the memory, bytes, and whether it goes on with the layer of the one before.
        self.runs: list[tuple[int, int, int, bool]] = []
        #: Of each layer: where in the payload it begins and ends; and how many copies there are up to its end, 0 if it is empty.
        self.cuts: list[tuple[int, int]] = []
        self.tops: list[int] = []
        left = list(door.RUN.iter_unpack(described[begin:]))[::-1]
        #: Where in the memory the block ends.
        self.stop = max((offset + size for offset, size in left), default=0)
        self._lay_out(left)
        if left or not self.runs:
            raise CorruptBlockError(UNFIT if left else "a block without payload came through the door")

    def _lay_out(self, left: list[tuple[int, int]]) -> None:
        """Take from the end of `left` what each layer needs."""
        stop = 0
        for row in self.header.rows[: self.header.present]:
            start = at = stop
            stop = start + row.size_bytes
            while at < stop:
                offset, size = left.pop() if left else (0, 0)
                if not 0 < size <= stop - at:
                    raise CorruptBlockError(UNFIT)
                self.runs.append((at, offset, size, at > start))
                at += size
            self.cuts.append((start, stop))
            self.tops.append(len(self.runs) if stop > start else 0)

    def parts(self, payload: memoryview) -> tuple[memoryview, ...]:
        """The layers in `payload`."""
        return tuple([payload[start:stop] for start, stop in self.cuts])


#: What was read lately: a prefix that many prompts share is read again and again, and lies where it lay.
_planned = lru_cache(maxsize=4096)(Planned)


def parse_plan(answer: bytes | memoryview, count: int) -> Iterator[Planned]:
    """Each leading block of a plan that is there. Raises CorruptBlockError for a plan that is cut short or not a block's."""
    answer, at = bytes(answer), door.NUMBER.size
    for _ in range(count):
        begin = at + door.PLANNED.size
        if begin > len(answer):
            raise CorruptBlockError(CUT_SHORT)
        status, header_bytes, runs, _, _ = door.PLANNED.unpack_from(answer, at)
        stop = begin + header_bytes + runs * door.RUN.size
        if stop > len(answer):
            raise CorruptBlockError(CUT_SHORT)
        if status != OK:
            return
        yield _planned(answer[at:stop], begin - at + header_bytes)
        at = stop


def certified(blocks: Sequence[Planned], crcs: Sequence[int]) -> tuple[int, str]:
    """How many leading blocks have the CRCs that their copies were found to have, and what is wrong with the next."""
    before = 0
    for number, block in enumerate(blocks):
        try:
            for layer, top in enumerate(block.tops, 1):
                block.header.check_layer(layer, crcs[before + top - 1] if top else 0)
        except CorruptBlockError as error:
            return number, str(error)
        before += len(block.runs)
    return len(blocks), ""
