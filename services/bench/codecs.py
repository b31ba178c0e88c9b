"""``bench codecs``: what a codec costs in time, beside what it does to the values.

Each codec encodes and decodes the real cache of a real prompt, in the cache's bfloat16. Three yardsticks take turns with it: a plain copy
of the same bytes, and the model's own prefill of the same tokens, which is what a hit saves: in bfloat16, and in float32, which is the
quicker one on processors that do not multiply bfloat16. With ``--device cuda`` all of that is on the GPU, blocks still being bytes on the
host, and a fourth yardstick is the same bytes' way from pinned host memory to the GPU.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kvstore.codecs import Codec, EncodedBlock, KVSample, Profile, calibrate, codec_class, create, names
from kvstore.errors import ConfigError

from .base import Result, log, relative_speed, take_turns
from .memory import peak_extra_bytes

_SEED = 0
#: Tokens of a profile that is learnt for this benchmark alone, and of one window of them.
_LEARNT_TOKENS, _WINDOW = 4096, 512
_YARDSTICKS = ("copy", "prefill", "prefill_float32", "transfer")
#: Options of each codec in this benchmark; the rest run with their defaults.
_OPTIONS: dict[str, dict[str, Any]] = {"svd": {"ratio": 4.0}, "transform": {"ratio": 16.0}}


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="directory or hub name of a causal LM (default: the default model)")
    parser.add_argument("--profile", metavar="FILE", help="for `transform` (default: the one kept for this model, or a small one)")
    parser.add_argument("--codec", nargs="+", choices=names(), help="only these (default: all)")
    parser.add_argument("--tokens", type=int, help="prompt length (2048; 512 with --quick)")
    parser.add_argument("--block", type=int, default=64, metavar="TOKENS", help="tokens a block (%(default)s)")
    parser.add_argument("--rounds", type=int, help="counted rounds (5; 3 with --quick)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where the cache is (%(default)s)")


def run(args: argparse.Namespace) -> Result:
    from services.evaluate.model import CachedModel
    from services.model.resolve import resolve_model
    from services.progress import Progress

    tokens = args.tokens or (512 if args.quick else 2048)
    rounds = args.rounds or (3 if args.quick else 5)
    if args.block < 1 or tokens < args.block:
        raise ConfigError(f"--tokens {tokens} must hold at least one block of {args.block}")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for and torch finds no GPU; use device 'cpu'")
    directory = resolve_model(args.model)
    model = CachedModel.load(directory, torch.bfloat16, args.device)
    ids = prompt_of(model, tokens // args.block * args.block)
    wanted = args.codec or names()
    profile, origin = _profile(args, model, directory) if any(codec_class(n).uses_profile for n in wanted) else (None, "none")
    chosen = [n for n in wanted if profile is not None or not codec_class(n).uses_profile]
    codecs = {name: create(name, model.layout, profile, **_OPTIONS.get(name, {})) for name in chosen}
    _, (keys, values) = model.run(ids, logits=False)
    batch = [blocks_of(x, args.block) for x in (keys, values)]
    precise = CachedModel.load(directory, device=args.device)
    with Progress("measuring, rounds") as report:
        contestants, encoded = _contestants(model, codecs, ids, batch, args.block)
        contestants["prefill_float32"] = lambda: precise.run(ids, logits=False)
        contestants = {name: _finished(call, args.device) for name, call in contestants.items()}
        samples = take_turns(contestants, rounds, report=report)
    extra = {name: peak_extra_bytes(contestants[f"{name}.decode"], args.device) for name in codecs}
    configuration = {
        "model": model.model.config._name_or_path.rsplit("/", 1)[-1], "tokens": len(ids), "block_tokens": args.block, "rounds": rounds,
        "dtype": "bfloat16", "device": args.device, "profile": origin,
        "codecs": {n: vars(c.config) for n, c in codecs.items()},
    }  # fmt: skip
    result = Result("codecs", configuration, _SEED, 1, {f"{name}_s": s for name, s in samples.items()})
    raw_bytes = model.layout.raw_bytes(len(ids))
    for name in codecs:
        result.rows.append(_row(name, encoded[name], samples, raw_bytes) | _memory(extra[name], raw_bytes))
        result.ratios |= {f"{name}.{k}": v for k, v in result.rows[-1].items() if "_to_" in k}
    return result


def _profile(args: argparse.Namespace, model: Any, directory: Path) -> tuple[Profile | None, str]:
    """The profile to use and where it comes from."""
    from services.profiles.obtain import find

    found = find(directory, args.profile)
    if found is not None:
        return found, "given" if args.profile else "kept for this model"
    if args.quick:
        log("there is no profile of this model, so `transform` is left out: give --profile, or leave out --quick")
        return None, "none"
    log(f"learning a small profile from {_LEARNT_TOKENS} tokens: right for speed, far from the best for quality")
    return _learn(model), f"learnt from {_LEARNT_TOKENS} tokens, without sensitivities"


def _learn(model: Any) -> Profile:
    """A profile from windows of text that comes after every prompt."""
    ids = prompt_of(model, 2 * _LEARNT_TOKENS)[_LEARNT_TOKENS:]
    weight = model.model.get_input_embeddings().weight.detach().float().cpu()

    def samples() -> Iterator[KVSample]:
        for start in range(0, len(ids), _WINDOW):
            window = ids[start : start + _WINDOW]
            _, (keys, values) = model.run(window, logits=False)
            yield KVSample(keys.float().cpu(), values.float().cpu(), 0, torch.tensor(window))

    return calibrate(replace(model.layout, dtype=torch.float32), samples(), weight)


def prompt_of(model: Any, tokens: int) -> list[int]:
    import pydoc_data.topics  # the language reference: prose that every Python has

    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = model.ids(text[: tokens * 8])[:tokens]
    if len(ids) < tokens:
        raise ConfigError(f"there are only {len(ids)} tokens of text; ask for fewer --tokens")
    return ids


def blocks_of(x_LHTD: torch.Tensor, block_tokens: int) -> torch.Tensor:
    """[L, H, T, D] as a batch of blocks [B, L, H, t, D], dense."""
    return x_LHTD.unflatten(2, (-1, block_tokens)).permute(2, 0, 1, 3, 4).contiguous()


def _contestants(
    model: Any, codecs: dict[str, Codec], ids: list[int], batch: list[torch.Tensor], block_tokens: int
) -> tuple[dict[str, Callable[[], object]], dict[str, list[EncodedBlock]]]:
    """The prefill, the copy, and each codec's two directions; and each codec's blocks."""
    out = tuple(torch.empty_like(x) for x in batch)
    starts = list(range(0, len(ids), block_tokens))
    tokens = torch.tensor(ids).view(-1, block_tokens)

    def copy() -> None:
        for target, source in zip(out, batch, strict=True):
            target.copy_(source)

    contestants: dict[str, Callable[[], object]] = {"prefill": lambda: model.run(ids, logits=False), "copy": copy}
    if batch[0].device.type == "cuda":
        pinned = [x.cpu().pin_memory() for x in batch]
        contestants["transfer"] = lambda: [target.copy_(source, non_blocking=True) for target, source in zip(out, pinned, strict=True)]
    encoded: dict[str, list[EncodedBlock]] = {}
    for name, codec in codecs.items():
        blocks = codec.encode(*batch, start=starts, tokens=tokens)
        encoded[name] = [EncodedBlock.from_bytes(b.to_bytes()) for b in blocks]
        contestants[f"{name}.encode"] = lambda codec=codec: codec.encode(*batch, start=starts, tokens=tokens)
        contestants[f"{name}.decode"] = lambda codec=codec, name=name: codec.decode(encoded[name], tokens=tokens, out=out)
    return contestants, encoded


def _finished(call: Callable[[], object], device: str) -> Callable[[], object]:
    """`call` until what it asked of `device` is done."""
    if device == "cpu":
        return call

    def finished() -> None:
        call()
        torch.cuda.synchronize()

    return finished


def _row(name: str, blocks: list[EncodedBlock], samples: dict[str, list[float]], raw_bytes: int) -> dict[str, Any]:
    """One codec's figures; rates count raw bytes (2 a value), and ``_to_`` keys are times faster."""
    stored = sum(block.header.total_bytes for block in blocks)
    worst = [block.distortion[block.fidelities[-1]] for block in blocks]
    seconds = {way: statistics.median(samples[f"{name}.{way}"]) for way in ("encode", "decode")}
    yardsticks = [yard for yard in _YARDSTICKS if yard in samples]
    return {
        "codec": name,
        "ratio": raw_bytes / stored,
        "key_error": statistics.mean(d.keys for d in worst),
        "value_error": statistics.mean(d.values for d in worst),
        "expected_divergence_nats": statistics.mean(block.expected_divergence for block in blocks),
        **{f"{way}_gb_per_s": raw_bytes / s / 1e9 for way, s in seconds.items()},
        **{f"{yard}_gb_per_s": raw_bytes / statistics.median(samples[yard]) / 1e9 for yard in yardsticks if "prefill" not in yard},
        **{f"{way}_to_{yard}": relative_speed(samples, f"{name}.{way}", yard) for way in seconds for yard in yardsticks},
    }


def _memory(extra: int | None, raw_bytes: int) -> dict[str, Any]:
    """What decoding takes beside the result, the peak of one call; null where the system does not tell."""
    return {"decode_extra_bytes": extra, "decode_extra_to_raw": None if extra is None else extra / raw_bytes}


def render(result: Result) -> str:
    """The table for people."""
    columns = {
        "codec": ("codec", "<11"), "ratio": ("ratio", ">7.2f"), "key_error": ("K error", ">10.6f"), "value_error": ("V error", ">10.6f"),
        "encode_gb_per_s": ("encode GB/s", ">13.3f"), "decode_gb_per_s": ("decode GB/s", ">13.3f"),
        "decode_to_copy": ("decode/copy", ">13.3f"), "encode_to_transfer": ("encode/transfer", ">16.3f"),
        "decode_to_transfer": ("decode/transfer", ">16.3f"), "decode_to_prefill": ("decode/prefill", ">16.1f"),
        "encode_to_prefill": ("encode/prefill", ">16.1f"), "decode_to_prefill_float32": ("decode/float32", ">16.1f"),
        "encode_to_prefill_float32": ("encode/float32", ">16.1f"), "decode_extra_to_raw": ("extra memory", ">14.2f"),
    }  # fmt: skip
    known = {name: how for name, how in columns.items() if all(row.get(name) is not None for row in result.rows)}
    lines = ["".join(f"{title:{spec.split('.')[0]}}" for title, spec in known.values())]
    lines += ["".join(f"{row[name]:{spec}}" for name, (_, spec) in known.items()) for row in result.rows]
    where = result.configuration
    lines.append(f"{where['model']} on {where['device']}, {where['tokens']} tokens in blocks of {where['block_tokens']}, bfloat16;")
    if where["device"] == "cuda":
        lines.append("transfer is the raw bytes' way from pinned memory to the GPU;")
    lines.append("rates count raw bytes; a/b = times faster: prefill is the model's own in bfloat16, float32 the same in float32;")
    lines.append(f"extra memory beside the result, in raw bytes; medians of {where['rounds']} rounds in which all take turns")
    return "\n".join(lines)
