"""``concertina plan``: how much memory a model's KV cache takes, and what each codec makes of it."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from kvstore.errors import ConfigError
from kvstore.settings import format_size, parse_size
from services.system.checks import check_count, check_ratio

if TYPE_CHECKING:
    from kvstore.layout import KVLayout
    from services.planner import Need

SHAPE = ("layers", "kv_heads", "head_dim")
MAX_TOKENS = 1 << 30


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR|HUB-NAME", help="model to plan for (default: SmolLM2-135M-Instruct)")
    for name in SHAPE:
        option = "--" + name.replace("_", "-")
        parser.add_argument(option, type=int, metavar="N", help=f"instead of a model: its {name.replace('_', ' ')}; give all three")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at once (%(default)s)")
    parser.add_argument("--context", type=int, default=4096, metavar="N", help="tokens of each sequence (%(default)s)")
    parser.add_argument("--ratio", type=float, help="for codecs that can be asked for one (default: each codec's own)")
    parser.add_argument("--arena", default="256MiB", metavar="SIZE", help="memory for blocks of one node (%(default)s)")
    parser.add_argument("--nodes", type=int, default=2, metavar="N", help="nodes that hold the store now (%(default)s)")


def run(args: argparse.Namespace) -> int:
    check_count("--batch", args.batch, 1, MAX_TOKENS)
    check_count("--context", args.context, 1, MAX_TOKENS)
    check_count("--nodes", args.nodes, 1)
    check_ratio(args.ratio)
    arena_bytes = parse_size(args.arena)
    name, layout = _layout(args)
    from services.planner import needs

    tokens = args.batch * args.context
    found = needs(layout, tokens, arena_bytes, args.nodes, args.ratio)
    shape = {key: getattr(layout, key) for key in SHAPE}
    result = {
        "model": name, **shape, "batch": args.batch, "context_tokens": args.context, "bytes_per_token": layout.raw_bytes(1),
        "raw_bytes": layout.raw_bytes(tokens), "arena_bytes": arena_bytes, "nodes": args.nodes,
        "codecs": [dataclasses.asdict(need) for need in found],
    }  # fmt: skip
    print(json.dumps(result) if args.json else _text(result, found))
    return 0


def _layout(args: argparse.Namespace) -> tuple[str, KVLayout]:
    """What to call it, and its layout with 2 bytes a value."""
    from kvstore.layout import KVLayout

    given = [getattr(args, key) for key in SHAPE]
    if any(value is not None for value in given):
        if None in given or args.model:
            raise ConfigError("give either --model, or all of --layers, --kv-heads and --head-dim")
        return "×".join(map(str, given)), KVLayout(*given)
    from services.model import resolve_model

    directory = resolve_model(args.model)
    return directory.name, KVLayout.from_model_config(_config(directory))


def _config(directory: Path) -> object:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(directory, local_files_only=True)


def _text(result: dict, found: list[Need]) -> str:
    arenas = f"{result['nodes']} × {format_size(result['arena_bytes'])}"
    lines = [
        f"{result['model']}: {format_size(result['bytes_per_token'])} a token at 2 bytes a value; "
        f"{result['batch']} × {result['context_tokens']} tokens are {format_size(result['raw_bytes'])}",
        f"{'codec':10} {'ratio':>6} {'these tokens':>14} {'nodes for them':>15}   tokens that fit {arenas}",
    ]
    for need in found:
        nodes = "–" if need.nodes_needed is None else f"{need.nodes_needed:,}"
        lines.append(f"{need.codec:10} {need.ratio:6.2f} {format_size(need.stored_bytes):>14} {nodes:>15}   {need.tokens_that_fit:,}")
    return "\n".join(lines)
