"""``concertina evaluate``: measure what a codec does to a model's output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from kvstore.errors import ConfigError


def configure(parser: argparse.ArgumentParser) -> None:
    from kvstore.codecs import names

    parser.add_argument("--model", metavar="DIR", help="directory or hub name of a causal LM (default: the default model)")
    parser.add_argument("--texts", nargs="+", default=[], metavar="PATH", help="text files or directories (default: what every Python has)")
    parser.add_argument("--codec", choices=names(), default="int8", help="%(default)s by default")
    parser.add_argument("--ratio", type=float, metavar="R", help="ratio to ask of the codec, where it has that option")
    parser.add_argument("--max-divergence", type=float, metavar="NATS", help="divergence to allow instead, where the codec has that option")
    parser.add_argument("--block", type=int, default=64, metavar="TOKENS", help="tokens a block (%(default)s)")
    parser.add_argument("--fidelity", type=int, metavar="N", help="truncate each block to N layers of precision")
    parser.add_argument("--profile", metavar="FILE", help="profile (default: the one kept for this model, else made now and kept)")
    parser.add_argument("--prefix", type=int, default=1024, metavar="TOKENS", help="tokens compressed (%(default)s)")
    parser.add_argument("--continue", dest="continued", type=int, default=256, metavar="TOKENS", help="tokens continued (%(default)s)")
    parser.add_argument("--windows", type=int, default=6, metavar="N", help="windows of text at most (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="divergence alone: no recall, pass key or rounds")
    parser.add_argument("--compare", action="store_true", help="every codec in one table")
    parser.add_argument("--plot", metavar="FILE", help="with --compare: write the plot of divergence against ratio, as SVG")


def run(args: argparse.Namespace) -> int:
    if not 1 <= args.block <= 1 << 16 or args.windows < 1:
        raise ConfigError("--block takes 1 to 65536 tokens, --windows at least 1")
    if args.plot and not args.compare:
        raise ConfigError("--plot draws what --compare measures; give both")
    from kvstore.codecs import codec_class
    from services.evaluate.model import CachedModel
    from services.evaluate.report import Evaluation, Plan, plot, table
    from services.model.resolve import resolve_model
    from services.profiles.obtain import obtain
    from services.progress import Progress

    directory = resolve_model(args.model)
    options: dict[str, Any] = {"ratio": args.ratio, "max_divergence": args.max_divergence}
    options = {name: value for name, value in options.items() if value is not None}
    wanted = args.profile or args.compare or codec_class(args.codec).uses_profile
    profile = obtain(directory, args.profile) if wanted else None
    plan = Plan(args.texts, args.prefix, args.continued, args.windows, not args.quick)
    with Progress("evaluating") as progress:
        evaluation = Evaluation(CachedModel.load(directory), plan, lambda what, done, total: progress(done, total))
        if args.compare:
            results = evaluation.compare(profile, args.block)
        else:
            results = [evaluation.measure(evaluation.codec(args.codec, profile, options), args.block, args.fidelity)]
    if args.plot:
        Path(args.plot).write_text(plot(results), encoding="utf-8")
    if args.json:
        print(json.dumps({"results": results} if args.compare else results[0]))
    else:
        print(table(results))
    return 0
