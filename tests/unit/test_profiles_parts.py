"""Parts of sharing profiles: chunks, files, the claim, and the child that calibrates."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

from kvstore.block import EncodedBlock
from kvstore.clock import ManualClock
from kvstore.codecs import PROFILE_WIRE_ID, Profile, name_of_wire_id
from kvstore.codecs.profile import shape_of
from kvstore.errors import ConcertinaError, CorruptBlockError, DeadlineError, LayoutMismatchError
from kvstore.identity import NO_PARENT, digest
from kvstore.layout import KVLayout
from kvstore.metadata import InprocMetadata, InprocState
from services.profiles import calibrator, chunks, claim, local
from services.profiles.shared import Note

LAYOUT = KVLayout(2, 1, 8, torch.float32)
MODEL = "ab" * 32


def profile(model: str = MODEL, layout: KVLayout = LAYOUT) -> Profile:
    return Profile(shape_of(layout), {"model": model}, {"a": torch.arange(2000.0)})


def test_a_file_becomes_chained_blocks_and_comes_back(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 1000)
    data = os.urandom(2500)
    blocks = [EncodedBlock.from_bytes(block.to_bytes()) for block in chunks.split(data)]
    headers = [block.header for block in blocks]
    assert [h.payload_bytes for h in headers] == [1000, 1000, 500] and {h.codec for h in headers} == {PROFILE_WIRE_ID}
    assert [h.parent for h in headers] == [NO_PARENT, headers[0].key, headers[1].key]
    assert [h.key for h in headers] == chunks.keys_of(digest(data), len(data))
    assert chunks.join(blocks, digest(data)) == data
    for wrong in (blocks[:2], blocks[::-1], [*blocks, blocks[0]]):
        with pytest.raises(CorruptBlockError):
            chunks.join(wrong, digest(data))


def test_other_files_have_other_keys_and_no_codec_has_the_number():
    a, b = (chunks.split(data)[0].header for data in (b"a", b"b"))
    assert a.key != b.key and a.namespace != b.namespace
    assert name_of_wire_id(PROFILE_WIRE_ID) is None


def test_a_note_survives_the_wire():
    data = profile().to_bytes()
    note = Note.of(profile(), data)
    assert Note.parse(note.to_bytes()) == note and note.digest == profile().digest.hex()
    assert note.keys == [block.header.key for block in chunks.split(data)]


NOTE = Note.of(profile(), b"x" * 100)
DAMAGED = [
    b"", b"{", b"[]", b"{}", b"\xff", b"[" * 60_000, NOTE.to_bytes()[:-2],
    *(replace(NOTE, **change).to_bytes() for change in (
        {"size_bytes": 0}, {"size_bytes": 1 << 40}, {"size_bytes": True}, {"size_bytes": "9"}, {"size_bytes": 9 << 20},
        {"digest": "../" * 30}, {"content": None}, {"first": "0" * 64},
    )),
]  # fmt: skip


@pytest.mark.parametrize("text", DAMAGED)
def test_a_damaged_note_is_refused(text):
    with pytest.raises(CorruptBlockError):
        Note.parse(text)


def test_profiles_are_kept_by_model_and_layout(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert local.find(MODEL, LAYOUT) is None
    local.save(profile(), MODEL, LAYOUT)
    assert local.find(MODEL, LAYOUT).digest == profile().digest
    assert local.find(MODEL, replace(LAYOUT, dtype=torch.bfloat16)).digest == profile().digest
    assert local.find("cd" * 32, LAYOUT) is None and local.find(MODEL, replace(LAYOUT, layers=3)) is None
    assert [p.suffix for p in (tmp_path / "concertina/profiles").iterdir()] == [".kvp"]


def test_files_that_are_no_good_are_as_good_as_none(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = local.path_of(MODEL, LAYOUT)
    for bad in (b"", b"\x01" * 500, profile().to_bytes()[:-9], profile("cd" * 32).to_bytes()):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bad)
        assert local.find(MODEL, LAYOUT) is None
    with pytest.raises(LayoutMismatchError, match="calibrate this model"):
        local.check(profile("cd" * 32), MODEL, LAYOUT)


async def test_one_worker_calibrates_until_it_lets_go_or_falls_silent(monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_S", 0.01)
    state, clock = InprocState(), ManualClock()
    first, second = (claim.Claim(InprocMetadata(clock, state), "m", clock) for _ in range(2))
    other = claim.Claim(InprocMetadata(clock, state), "another model", clock)
    assert await first.take() and not await second.take() and await other.take() and await first.take()
    clock.advance(claim.STALE_S - 1)
    await first.renew()
    clock.advance(claim.STALE_S - 1)
    assert not await second.take()
    clock.advance(2)
    assert await second.take() and not await first.take()
    await second.release()
    assert await first.take()


async def test_of_two_that_start_together_one_wins(monkeypatch):
    monkeypatch.setattr(claim, "SETTLE_S", 0.05)
    state, clock = InprocState(), ManualClock()
    claims = [claim.Claim(InprocMetadata(clock, state), "m", clock) for _ in range(4)]
    assert sum(await asyncio.gather(*(c.take() for c in claims))) == 1


def program(text: str):
    """A calibrator that runs `text` with the file to write as its argument."""
    return lambda model, out: [sys.executable, "-c", text, str(out)]


async def test_what_the_child_writes_is_the_profile(tmp_path):
    source, path = tmp_path / "source", tmp_path / "deep" / "p.kvp"
    profile().save(source)
    made = await calibrator.calibrate("m", path, program(f"import sys, shutil; shutil.copy({str(source)!r}, sys.argv[1])"))
    assert made.digest == profile().digest and Profile.load(path).digest == made.digest
    assert list(path.parent.iterdir()) == [path]


async def test_the_child_is_nice_and_carries_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("CONCERTINA_UP", "mark")
    seen = tmp_path / "seen"
    text = f"import os; open({str(seen)!r}, 'w').write(os.environ['CONCERTINA_UP'] + str(os.nice(0))); raise SystemExit(3)"
    with pytest.raises(ConcertinaError, match="exit status 3"):
        await calibrator.calibrate("m", tmp_path / "p.kvp", program(text))
    assert seen.read_text().startswith("mark") and int(seen.read_text()[4:]) >= 15
    assert list(tmp_path.iterdir()) == [seen]


async def test_a_calibration_that_is_late_or_not_wanted_any_more_is_ended(tmp_path):
    endless = program("import time; time.sleep(600)")
    with pytest.raises(DeadlineError):
        await calibrator.calibrate("m", tmp_path / "p.kvp", endless, timeout_s=0.3)
    task = asyncio.create_task(calibrator.calibrate("m", tmp_path / "p.kvp", endless))
    await asyncio.sleep(0.3)
    task.cancel()
    await asyncio.wait({task})
    assert task.cancelled() and not any("time.sleep(600)" in " ".join(p.cmdline()) for p in psutil.Process().children(recursive=True))


def test_a_killed_worker_leaves_no_calibration():
    """Whoever starts the child dies by SIGKILL, and says the child's pid before."""
    worker = (
        "import os, subprocess, sys, time; "
        "c = subprocess.Popen([sys.executable, '-m', 'services.profiles.child', str(os.getpid()), sys.executable, '-c', "
        "'print(1, flush=True); import time; time.sleep(600)'], stdout=subprocess.PIPE); "
        "c.stdout.readline(); print(c.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", worker], stdout=subprocess.PIPE)
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    psutil.wait_procs([child], timeout=10)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
