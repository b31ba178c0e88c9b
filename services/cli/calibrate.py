"""``concertina calibrate``: learn a model's profile for the transform codec from text."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from kvstore.errors import ConfigError
from services.system.checks import check_device


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR", help="directory or hub name of a causal LM (default: the default model)")
    parser.add_argument("--texts", nargs="+", default=[], metavar="PATH", help="text files or directories (default: what every Python has)")
    parser.add_argument("--tokens", type=int, default=50_000, metavar="N", help="tokens to run through the model (%(default)s)")
    parser.add_argument("--groups", default="auto", metavar="N", help="runs of layers coded together; fewer: smaller, slower (%(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs (%(default)s)")
    parser.add_argument("--out", required=True, metavar="FILE", help="where the profile is written")


def run(args: argparse.Namespace) -> int:
    out = Path(args.out)
    if out.is_dir():
        raise ConfigError(f"--out {out} is a directory; name the file to write")
    check_device(args.device)
    from services.calibrate.run import calibrate_model
    from services.model.resolve import resolve_model
    from services.progress import Progress

    began = time.monotonic()
    with Progress("calibrating, windows of text") as report:
        profile = calibrate_model(
            resolve_model(args.model), args.texts, tokens=args.tokens, groups=args.groups, device=args.device, report=report
        )
    profile.save(out)
    result = {
        "profile": str(out), "digest": profile.digest.hex(), "size_bytes": profile.size_bytes, "tokens": profile.facts["tokens"],
        "groups": len(profile.facts["groups"]), "seconds": round(time.monotonic() - began, 1),
    }  # fmt: skip
    if args.json:
        print(json.dumps(result))
    else:
        print(f"{out}: {result['size_bytes'] / 1e6:.1f} MB, {result['tokens']} tokens, {result['groups']} groups, {result['seconds']} s")
    return 0
