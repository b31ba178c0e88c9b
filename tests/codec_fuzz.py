"""A seeded fuzzer of encoded blocks: whatever the bytes, a block, a tensor or `CorruptBlockError`, in bounded time and memory.

``python -m tests.codec_fuzz --seconds 600 --seed 1`` runs it for as long as one likes and prints the counts. Half of the mutations
leave the checksums broken (what a bad disk does); half repair them, so that the damage reaches the decoders (what a bad peer does).
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from kvstore.block import EncodedBlock
from kvstore.codecs import names
from kvstore.errors import CorruptBlockError
from kvstore.layout import KVLayout
from tests.codec_support import make_codec, make_tensors, rope

LAYOUT = KVLayout(3, 2, 32, torch.float16, rope(32))
TOKENS = 24
#: No single decode of a block this small may take longer, on however busy a machine.
MOST_SECONDS = 20.0
#: Nor may the process grow by more than this.
MOST_GROWTH_BYTES = 1 << 30


@dataclass
class Report:
    """Counts by codec and outcome; `failures` says how to reproduce each one."""

    seed: int
    cases: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


def mutate(data: bytearray, rng: random.Random) -> bytearray:
    """One to four small damages: flipped bits, extreme bytes, cut or repeated or shifted spans."""
    for _ in range(rng.randint(1, 4)):
        if not data:
            return data
        at = rng.randrange(len(data))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
        elif kind == 2:
            width = rng.choice((2, 4))
            data[at : at + width] = rng.choice((b"\xff" * width, b"\0" * width, rng.randbytes(width)))
        elif kind == 3:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randint(1, 64)]
        else:
            data[at : at + 16] = rng.randbytes(16)
    return data


def damaged(block: EncodedBlock, rng: random.Random) -> bytes:
    """A mutated blob; in half of the cases with every length and checksum made right again."""
    if rng.random() < 0.5:
        return bytes(mutate(bytearray(block.to_bytes()), rng))
    layers = [bytearray(p) for p in block.payload]
    target = rng.randrange(len(layers))
    # The first bytes hold the lengths and counts that a decoder trusts at its peril.
    head = rng.choice((8, 64, len(layers[target])))
    layers[target][:head] = mutate(layers[target][:head], rng)
    return EncodedBlock.build(block.header, [bytes(p) for p in layers]).to_bytes()


def fuzz(seed: int, seconds: float | None = None, cases: int | None = None) -> Report:
    """Run for a time or a number of cases; every case depends on the seed and its own number alone."""
    report = Report(seed)
    blocks = []
    for name in names():
        for start in (0, 64):
            keys, values, ids = make_tensors(LAYOUT, TOKENS, 3, start)
            blocks.append((name, make_codec(name, LAYOUT), make_codec(name, LAYOUT).encode(keys, values, start=start, tokens=ids), ids))
    for _, codec, block, ids in blocks:
        codec.decode(block, tokens=ids)  # compiled before anything is timed
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    ends = time.monotonic() + seconds if seconds is not None else float("inf")
    while time.monotonic() < ends and (cases is None or report.cases < cases):
        name, codec, block, ids = blocks[report.cases % len(blocks)]
        case = f"seed {seed}, case {report.cases}, codec {name}"
        began = time.monotonic()
        try:
            read = EncodedBlock.from_bytes(damaged(block, random.Random(f"{seed}:{report.cases}")))
            if (read.header.codec, read.header.tokens) == (codec.wire_id, TOKENS):
                codec.decode(read, tokens=ids)
            outcome = "decoded"
        except CorruptBlockError:
            outcome = "refused"
        except Exception as error:  # noqa: BLE001 - whatever else comes out is the finding
            outcome = "failed"
            report.failures.append(f"{case}: {type(error).__name__}: {error}")
        if time.monotonic() - began > MOST_SECONDS:
            report.failures.append(f"{case}: took {time.monotonic() - began:.1f} s")
        report.outcomes[f"{name} {outcome}"] += 1
        report.cases += 1
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    if growth > MOST_GROWTH_BYTES:
        report.failures.append(f"seed {seed}: memory grew by {growth} bytes")
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = fuzz(args.seed, args.seconds)
    print(json.dumps({"seed": report.seed, "cases": report.cases, "outcomes": report.outcomes, "failures": report.failures[:50]}, indent=1))
    return 1 if report.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
