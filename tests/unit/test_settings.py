"""Settings: one loader, and no key that is silently ignored."""

from dataclasses import dataclass

import pytest

from kvstore.errors import ConfigError
from kvstore.settings import format_size, load, parse_size


@dataclass(frozen=True)
class Config:
    arena_bytes: int = 1
    name: str = "n"
    strict: bool = False
    limit: int | None = None


@pytest.mark.parametrize(
    ("text", "size"),
    [("256MiB", 256 << 20), ("1.5 GiB", 3 << 29), ("2GB", 2 * 10**9), (4096, 4096), ("7", 7), ("2T", 2 * 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1 parsec", "1e9"])
def test_no_size(text):
    with pytest.raises(ConfigError, match="256MiB"):
        parse_size(text)


def test_environment_then_overrides(monkeypatch):
    monkeypatch.setenv("CONCERTINA_NODE__ARENA_BYTES", "2KiB")
    monkeypatch.setenv("CONCERTINA_NODE__STRICT", "true")
    monkeypatch.setenv("CONCERTINA_NODE__LIMIT", "1MiB")
    assert load(Config, "node", name=None) == Config(2048, "n", True, 1 << 20)
    assert load(Config, "node", arena_bytes=5).arena_bytes == 5


def test_unknown_keys_are_errors(monkeypatch):
    with pytest.raises(ConfigError, match="colour"):
        load(Config, "node", colour=1)
    monkeypatch.setenv("CONCERTINA_NODE__COLOUR", "1")
    with pytest.raises(ConfigError, match="COLOUR"):
        load(Config, "node")


def test_wrong_type(monkeypatch):
    monkeypatch.setenv("CONCERTINA_NODE__STRICT", "perhaps")
    with pytest.raises(ConfigError, match="STRICT"):
        load(Config, "node")


def test_format_size():
    assert format_size(512) == "512 B" and format_size(3 << 20) == "3.0 MiB" and format_size(5 << 40) == "5120.0 GiB"
