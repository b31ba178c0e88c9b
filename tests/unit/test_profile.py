"""Profiles: a file that names itself by its content and is refused when it is something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kvstore.codecs.profile import Profile, shape_of
from kvstore.errors import ConfigError, InvalidInputError, LayoutMismatchError
from kvstore.layout import KVLayout, RopeSpec

LAYOUT = KVLayout(2, 1, 8, torch.float32, RopeSpec((1.0, 0.5)))


def profile(value: float = 1.0, **facts: object) -> Profile:
    tensors = {"b": torch.full((3, 2), value), "a": torch.arange(4, dtype=torch.int32), "c": torch.ones(2, dtype=torch.float16)}
    return Profile(shape_of(LAYOUT), {"groups": [2]} | facts, tensors)


def test_a_saved_profile_comes_back_under_the_same_digest(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.profile"
    profile().save(path)
    loaded = Profile.load(path)
    assert loaded.digest == profile().digest and len(loaded.digest) == 32
    assert loaded.facts == {"groups": [2]} and loaded.size_bytes == 24 + 16 + 4
    assert all(torch.equal(loaded.tensors[n], t) for n, t in profile().tensors.items())
    assert [p.name for p in path.parent.iterdir()] == ["model.profile"]


def test_the_digest_covers_values_names_and_facts() -> None:
    digests = {profile().digest, profile(2.0).digest, profile(model="x").digest}
    renamed = profile()
    other = Profile(renamed.shape, renamed.facts, {"d" if n == "c" else n: t for n, t in renamed.tensors.items()})
    assert len(digests | {other.digest}) == 4


def test_only_the_shape_and_rotation_must_match_not_the_dtype() -> None:
    made = profile()
    made.check(KVLayout(2, 1, 8, torch.bfloat16, LAYOUT.rope))
    with pytest.raises(LayoutMismatchError, match="layers, heads"):
        made.check(KVLayout(3, 1, 8, torch.float32, LAYOUT.rope))
    with pytest.raises(LayoutMismatchError, match="rotary"):
        made.check(KVLayout(2, 1, 8, torch.float32))


@pytest.mark.parametrize("data", [b"", b"no profile at all", b"\xff" * 64, b"\x02\0\0\0\0\0\0\0{}"])
def test_other_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidInputError, match="not a profile"):
        Profile.from_bytes(data)


def test_a_damaged_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError):
        Profile.from_bytes(profile().to_bytes()[:-5])
    with pytest.raises(ConfigError, match="concertina calibrate"):
        Profile.load(tmp_path / "absent")
