"""One tier behind the arena: its bound, its queue, what survives, and what it does with bytes that are not what they should be."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from kvstore.arena import Extent
from kvstore.block import EncodedBlock
from kvstore.clock import ManualClock
from kvstore.errors import ConfigError, CorruptBlockError
from kvstore.node.spill import TIERS, Level, SpillTier, create, record
from kvstore.node.spill.disk import PAGE_BYTES, SUFFIX
from kvstore.node.spill.journal import SLACK_ENTRIES, Journal, Place
from kvstore.node.spill.level import PAUSE_S, Spilled
from kvstore.node.table import block_id
from tests.node_support import block, chain

SIZE = 3 * PAGE_BYTES  # what a test block costs on a disk; a little more than its bytes


def tier(name: str, place: Path) -> SpillTier:
    return create(name, **({"directory": place, "capacity_bytes": 4 * SIZE + 100} if name == "disk" else {}))


def offer(level: Level, one: EncodedBlock, owner: str = "") -> bool:
    id = block_id(owner, one.header.key)
    if not level.wants(id, owner, one.header):
        return False
    level.offer(id, Spilled.of(owner, one.header), one.payload)
    return True


def place_of(place: Path, one: EncodedBlock) -> tuple[Path, int]:
    """The segment that holds a block, and where it begins."""
    return next((path, at) for path in place.rglob(f"*{SUFFIX}") if (at := path.read_bytes().find(one.to_bytes())) >= 0)


def overwrite(place: Path, one: EncodedBlock, data: bytes, offset: int) -> None:
    path, at = place_of(place, one)
    with path.open("r+b") as file:
        file.seek(at + offset)
        file.write(data)


def on_disk(place: Path) -> int:
    return sum(path.stat().st_size for path in place.rglob(f"*{SUFFIX}"))


def modes(place: Path) -> set[str]:
    return {oct(path.stat().st_mode & 0o777) for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest_asyncio.fixture(params=TIERS)
async def level(request, tmp_path: Path, clock: ManualClock) -> AsyncIterator[Level]:
    behind = tier(request.param, tmp_path)
    one = Level(behind, 4 * behind.cost(Spilled.of("", block(0).header).size_bytes), 8 * SIZE, clock)
    yield one
    await one.flush()
    one.check()
    one.close()


@pytest_asyncio.fixture
async def disk(tmp_path: Path, clock: ManualClock) -> AsyncIterator[Level]:
    one = Level(tier("disk", tmp_path), 4 * SIZE + 100, 8 * SIZE, clock)
    yield one
    await one.flush()
    one.close()


async def test_a_block_comes_back_while_it_waits_and_after_it_was_written(level: Level) -> None:
    one = block(1)
    assert offer(level, one)
    assert (await level.read(one.header.key)).to_bytes() == one.to_bytes()
    await level.flush()
    assert level.queued_bytes == 0
    assert (await level.read(one.header.key)).to_bytes() == one.to_bytes()
    assert (level.tally.stored, level.tally.read) == (1, 2)


async def test_bytes_are_bounded_and_of_a_chain_the_leaves_go_first(level: Level) -> None:
    blocks = chain(6)
    for one in reversed(blocks):  # an arena gives up leaves first
        assert offer(level, one)
        level.check()
    await level.flush()
    assert [one.header.key in level.entries for one in blocks] == [True] * 4 + [False] * 2
    assert level.tally.dropped == {"pressure": 2}


async def test_only_a_better_copy_replaces(level: Level) -> None:
    full = block(1, error=0.125)  # a header keeps 32 bits of it
    assert offer(level, full.truncate(1))
    assert not offer(level, full.truncate(1))
    assert offer(level, full)
    assert not offer(level, full.truncate(1))
    await level.flush()
    assert (await level.read(full.header.key)).header.present == 2
    assert level.used_bytes == level.tier.cost(Spilled.of("", full.header).size_bytes)


async def test_what_comes_while_the_queue_is_full_is_not_taken(level: Level) -> None:
    level.queue_bytes = level.capacity_bytes // 4
    assert offer(level, block(1))
    assert not offer(level, block(2))
    assert level.tally.dropped == {"queue": 1}
    await level.flush()
    assert offer(level, block(2))


async def test_removed_blocks_are_gone_even_before_they_were_written(level: Level) -> None:
    for number in (1, 2):
        offer(level, block(number))
    assert level.remove(block(1).header.key)
    assert not level.remove(block(1).header.key)
    await level.flush()
    assert await level.read(block(1).header.key) is None
    assert list(level.entries) == [block(2).header.key]


async def test_files_are_private_and_bounded_and_pages_are_used_again(disk: Level, tmp_path: Path) -> None:
    for number in range(40):
        offer(disk, block(number, (2000 + 100 * number, 5000)))
        await disk.flush()
        disk.check()
        assert disk.used_bytes == disk.tier.used_bytes <= disk.capacity_bytes
        assert on_disk(tmp_path) <= disk.capacity_bytes
    assert modes(tmp_path) == {"0o600"}


async def test_dropped_bytes_are_no_block_any_more(disk: Level, tmp_path: Path) -> None:
    offer(disk, block(1))
    await disk.flush()
    path, at = place_of(tmp_path, block(1))
    disk.remove(block(1).header.key)
    await disk.flush()
    with pytest.raises(CorruptBlockError):
        record.read(path.read_bytes()[at - len(record.prefix("")) :][: len(record.prefix("")) + block(1).header.total_bytes])


async def test_an_earlier_processs_blocks_are_found_and_verified(disk: Level, tmp_path: Path, clock: ManualClock) -> None:
    for one in chain(3):
        offer(disk, one)
    offer(disk, block(9), owner="team-a")
    await disk.flush()
    disk.close()
    overwrite(tmp_path, chain(3)[1], b"?", 1000)
    with (tmp_path / "index").open("ab") as journal:
        journal.write(b"torn")
    told: list[bytes] = []
    after = Level(tier("disk", tmp_path), 4 * SIZE + 100, 8 * SIZE, clock, told.append)
    await after.recover()
    assert told == [one.header.key for one in [*chain(3), block(9)]]
    assert after.used_bytes == after.tier.used_bytes == 4 * SIZE
    assert (await after.read(chain(3)[0].header.key)).to_bytes() == chain(3)[0].to_bytes()
    assert await after.read(block(9).header.key) is None, "it is team-a's"
    assert (await after.read(block_id("team-a", block(9).header.key))).to_bytes() == block(9).to_bytes()
    assert await after.read(chain(3)[1].header.key) is None, "a damaged payload"
    assert (after.tally.corrupt, after.tally.dropped) == (1, {"corrupt": 1})
    await after.flush()
    assert after.tier.used_bytes == 3 * SIZE
    assert offer(after, block(7))
    await after.flush()
    assert (await after.read(block(7).header.key)).to_bytes() == block(7).to_bytes()
    after.close()


async def test_recovery_keeps_within_a_smaller_bound(disk: Level, tmp_path: Path, clock: ManualClock) -> None:
    for one in chain(4):
        offer(disk, one)
    await disk.flush()
    disk.close()
    small = create("disk", directory=tmp_path, capacity_bytes=2 * SIZE)
    after = Level(small, 2 * SIZE, 8 * SIZE, clock)
    await after.recover()
    await after.flush()
    after.check()
    assert after.used_bytes == small.used_bytes == 2 * SIZE
    assert sum([await after.read(one.header.key) is not None for one in chain(4)]) == 2
    after.close()


@pytest.mark.parametrize("harm", ["journal of another kind", "journal gone", "journal lies", "segments gone"])
async def test_whatever_lies_in_the_directory_is_a_block_or_a_miss(disk: Level, tmp_path: Path, clock: ManualClock, harm: str) -> None:
    for one in chain(4):
        offer(disk, one)
    await disk.flush()
    disk.close()
    journal = tmp_path / "index"
    if harm == "journal of another kind":
        journal.write_bytes(os.urandom(5000))
    elif harm == "journal gone":
        journal.unlink()
    elif harm == "journal lies":
        log = Journal(journal, 256)
        places = list(log.places.items())
        log.rewrite({id: Place(place.size_bytes, (Extent(2 * number, 3),)) for number, (id, place) in enumerate(places)})
        log.close()
    else:
        shutil.rmtree(tmp_path / "blocks")
    after = Level(tier("disk", tmp_path), 4 * SIZE + 100, 8 * SIZE, clock)
    await after.recover()
    for one in chain(4):
        assert (found := await after.read(one.header.key)) is None or found.to_bytes() == one.to_bytes()
    for one in chain(4, first=10):
        assert offer(after, one)
    await after.flush()
    assert [(await after.read(one.header.key)).to_bytes() for one in chain(4, first=10)] == [one.to_bytes() for one in chain(4, first=10)]
    after.check()
    after.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
async def test_a_place_that_cannot_be_written_costs_the_block_and_a_pause(
    disk: Level, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    told: list[bytes] = []
    disk._changed = told.append

    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fail)
        offer(disk, block(1))
        await disk.flush()
    assert told == [block(1).header.key]
    assert disk.used_bytes == disk.tier.used_bytes == 0
    assert disk.tally.dropped == {"full" if number == errno.ENOSPC else "unwritable": 1}
    assert not offer(disk, block(1)), "it is not tried again at once"
    clock.advance(PAUSE_S + 1)
    assert offer(disk, block(1))


@pytest.mark.parametrize("harm", ["bit", "cut", "another"])
async def test_bytes_that_are_not_what_they_were_are_a_counted_miss(disk: Level, tmp_path: Path, harm: str) -> None:
    one, other = block(1), block(2)
    offer(disk, other)
    offer(disk, one)
    await disk.flush()
    path, at = place_of(tmp_path, one)
    if harm == "bit":
        overwrite(tmp_path, one, b"?", 1000)
    elif harm == "cut":
        os.truncate(path, at + 1000)
    else:
        overwrite(tmp_path, one, other.to_bytes(), 0)
    assert await disk.read(one.header.key) is None
    assert disk.tally.dropped == {"corrupt": 1}
    assert disk.tally.corrupt == 1
    assert (await disk.read(other.header.key)).to_bytes() == other.to_bytes()
    assert disk.used_bytes == SIZE


async def test_a_journal_is_written_afresh_when_it_is_outgrown(disk: Level, tmp_path: Path) -> None:
    for step in range(SLACK_ENTRIES):
        disk.tier.store(block(step % 3).header.key, [b"x" * 100])
    assert (tmp_path / "index").stat().st_size < 100 * SLACK_ENTRIES


def test_a_directory_serves_one_living_node(tmp_path: Path) -> None:
    first = tier("disk", tmp_path / "spill")
    with pytest.raises(ConfigError, match="another living node"):
        tier("disk", tmp_path / "spill")
    first.close()
    tier("disk", tmp_path / "spill").close()
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--spill"):
        tier("disk", tmp_path / "file")


def test_any_bytes_are_a_record_or_an_error_of_ours() -> None:
    whole = record.prefix("team-a") + block(1).to_bytes()
    assert record.read(whole)[0] == "team-a"
    assert record.read_head(whole).size_bytes == len(whole)
    for at in range(40):
        spoilt = bytearray(whole)
        spoilt[at] ^= 0x41
        with pytest.raises(CorruptBlockError):
            record.read(spoilt)
    for size in range(0, record.read_head(whole).header.header_bytes, 7):
        with pytest.raises(CorruptBlockError):
            record.read_head(whole[:size])


async def test_reading_and_writing_side_by_side(level: Level) -> None:
    """Blocks come and go while they are read: each answer is the whole block or none."""
    blocks = [block(number, (2000, 3000)) for number in range(8)]

    async def read_on() -> int:
        seen = 0
        for _ in range(40):
            for one in blocks:
                await asyncio.sleep(0)
                if (found := await level.read(one.header.key)) is not None:
                    assert found.to_bytes() == one.to_bytes()
                    seen += 1
        return seen

    async def write_on() -> None:
        for step in range(200):
            one = blocks[step * 5 % 8]
            if not level.remove(one.header.key):
                offer(level, one)
            level.check()
            await asyncio.sleep(0)

    seen, _ = await asyncio.gather(read_on(), write_on())
    assert seen
    assert level.tally.corrupt == 0
