"""A model's directory in Hugging Face's form: is it complete, and what is its fingerprint?"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path

from kvstore.errors import ConfigError
from kvstore.identity import digest

INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
#: The format's own bound on its JSON header; a larger number is no safetensors file.
MAX_HEADER_BYTES = 100_000_000
SAMPLE_BYTES = 4096


def check(path: Path) -> Path:
    """`path`, when it is a directory that holds a config, all weights as safetensors, and a tokenizer.

    Raises
    ------
    ConfigError
        Names what is missing and what the directory should hold.
    """
    if not path.is_dir():
        raise ConfigError(f"model directory {path} does not exist; give a Hugging Face model directory or a hub name such as org/name")
    missing = []
    if not (path / "config.json").is_file():
        missing.append("config.json")
    missing += _missing_weights(path)
    if not any((path / name).is_file() for name in TOKENIZERS):
        missing.append("a tokenizer (tokenizer.json)")
    if missing:
        raise ConfigError(f"{path} is no Hugging Face model directory: it lacks {', '.join(missing)}")
    if "model_type" not in _json_object(path / "config.json"):
        raise ConfigError(f"{path / 'config.json'} names no model_type; take the config.json that came with the weights")
    return path


def fingerprint(path: Path) -> str:
    """BLAKE2b-256, in hex, of ``config.json`` and of each weight file's name, size, header and a sample of every tensor.

    Headers and sizes alone would be the same for two fine-tunes of one model, whose caches must never be mixed; so 4 KiB from the
    middle of each tensor go in too. Reads a few MiB, whatever the model's size.

    Raises
    ------
    ConfigError
        For a directory without weights, or a weight file that is no safetensors file.
    """
    parts = [b"concertina-model", (path / "config.json").read_bytes()]
    files = weight_files(path)
    if not files:
        raise ConfigError(f"{path} holds no *.safetensors weights")
    for file in files:
        parts += [file.name.encode(), struct.pack("<Q", file.stat().st_size), *_header_and_samples(file)]
    return digest(*parts).hex()


def weight_files(path: Path) -> list[Path]:
    """The directory's safetensors files, sorted by name."""
    return sorted(path.glob("*.safetensors"))


def _missing_weights(path: Path) -> list[str]:
    if (path / INDEX).is_file():
        shards = _json_object(path / INDEX).get("weight_map", {})
        return sorted({shard for shard in shards.values() if not (path / shard).is_file()})
    return [] if weight_files(path) else ["weights (*.safetensors)"]


def _header_and_samples(file: Path) -> Iterator[bytes]:
    """The JSON header as it stands, then `SAMPLE_BYTES` from the middle of each tensor, in order of the tensors' names."""
    with file.open("rb") as stream:
        prefix = stream.read(8)
        header_bytes = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < header_bytes <= min(MAX_HEADER_BYTES, file.stat().st_size - 8):
            raise ConfigError(f"{file} is no safetensors file; fetch it again")
        header = stream.read(header_bytes)
        yield header
        try:
            spans = [entry["data_offsets"] for name, entry in sorted(json.loads(header).items()) if name != "__metadata__"]
            for start, stop in spans:
                stream.seek(8 + header_bytes + max(start, (start + stop - SAMPLE_BYTES) // 2))
                yield stream.read(min(SAMPLE_BYTES, stop - start))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"{file} has a malformed safetensors header; fetch it again") from error


def _json_object(file: Path) -> dict:
    try:
        value = json.loads(file.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{file} is not valid JSON; fetch the model again") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{file} must hold one JSON object; fetch the model again")
    return value
