"""``bench serving``: our engine beside `transformers`' own generate and beside vLLM, and what the network costs on top.

The engine and the plain model run in this process with the same weights, dtype and threads, and take turns. The cost of gRPC and HTTP
is measured on a system of its own: how much longer a caller waits, for the same short text, than one who calls the engine in process.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from typing import Any

import torch

from services.plot import line_plot

from .base import Result, log
from .workload import Answer, add_device, ask, ask_together, percentile, system, text_prompts

BATCHES = (1, 4, 8, 16)
PROMPT_TOKENS = 64
#: Tokens of the prompt whose prefill is timed.
LONG_PROMPT = 2048
#: So many of them a round: each takes seconds, in which the machine may be slower by a tenth than in the next ones.
LONG_PROMPTS = 3
#: Calls of one protocol before it is the other's turn: a server is as warm as it is among requests of its own kind.
CALLS_IN_TURN = 10
SHORT_PROMPT = "The tide was low"
_ARENA_BYTES = 64 << 20


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="", metavar="DIR", help="directory or hub name of a causal LM (default: the default model)")
    add_device(parser)
    parser.add_argument("--new-tokens", type=int, metavar="N", help="tokens of each answer (48; 24 with --quick)")
    parser.add_argument("--rounds", type=int, help="counted rounds (5; 2 with --quick)")
    parser.add_argument("--calls", type=int, help="calls of each protocol, for their cost (60; 20 with --quick)")
    parser.add_argument("--vllm-python", metavar="FILE", help="a Python that has vLLM (default: this one, if it has)")
    parser.add_argument("--load", type=float, metavar="MINUTES", help="instead: a system under twice what it can do, for so long")


def run(args: argparse.Namespace) -> Result:
    from services.model.resolve import resolve_model

    model = resolve_model(args.model)
    if args.load:
        from .load import run_load

        return run_load(model, args.load, args.device)
    new = args.new_tokens or (24 if args.quick else 48)
    rounds, calls = args.rounds or (2 if args.quick else 5), args.calls or (20 if args.quick else 60)
    batches = BATCHES[::2] if args.quick else BATCHES
    configuration = {"model": model.name, "device": args.device, "prompt_tokens": PROMPT_TOKENS, "new_tokens": new, "rounds": rounds}
    result = Result("serving", configuration | {"calls": calls})
    asyncio.run(_in_process(result, model, batches, new, rounds, 1024 if args.quick else LONG_PROMPT, calls, args.device))
    _vllm(result, model, args.vllm_python, batches, new)
    with system(model, workers=1, arena_bytes=_ARENA_BYTES, nodes=1, device=args.device) as running:
        _network(result, running, calls)
    return result


async def _in_process(
    result: Result, model: Any, batches: tuple[int, ...], new: int, rounds: int, long: int, calls: int, device: str = "cpu"
) -> None:
    """Engine and plain model in turns; samples are seconds, and tokens a second where they say so."""
    from services.bench.plain import Plain
    from services.engine.config import EngineConfig
    from services.engine.transformers_engine import TransformersEngine

    engine = TransformersEngine(EngineConfig(str(model), device=device))
    await engine.start()
    try:
        plain = Plain(model, engine.info.layout.dtype, device)
        result.configuration |= {
            "dtype": str(engine.info.layout.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "long_prompt_tokens": long,
            "plain": f"transformers generate, {plain.attention} attention, equal prompt lengths in one batch", "max_batch": 8,
        }  # fmt: skip
        for number in range(-1, rounds):
            log(f"bench: round {number + 1} of {rounds}")
            kept = result.samples if number >= 0 else {}
            for batch in batches:
                prompts = text_prompts(engine, [PROMPT_TOKENS] * batch, skip=(number + 1) * PROMPT_TOKENS * max(batches))
                _note(kept, f"engine.{batch}", _of_answers(await ask_together(engine, prompts, new), new))
                _note(kept, f"plain.{batch}", plain.measure(prompts, new))
        for number in range(-1, LONG_PROMPTS * rounds):
            log(f"bench: long prompt {number + 1} of {LONG_PROMPTS * rounds}")
            fresh = (rounds + 1) * PROMPT_TOKENS * max(batches) + (number + 1) * long  # text that no prompt above was cut from
            (prompt,) = text_prompts(engine, [long], skip=fresh)
            kept = result.samples if number >= 0 else {}
            for who in ("engine", "plain")[:: -1 if number % 2 else 1]:  # who is first, by turns
                took_s = plain.prefill(prompt) if who == "plain" else (await ask_together(engine, [prompt], 1))[0].ttft_s
                _note(kept, who, {"prefill_s": took_s})
        for number in range(-1, calls):
            began = time.perf_counter()
            answer = await ask(engine, engine.tokenize(SHORT_PROMPT), 1)
            beyond_ms = 1e3 * (time.perf_counter() - began) - answer.last.timing.total_ms
            _note(result.samples if number >= 0 else {}, "in_process", {"beyond_engine_ms": beyond_ms})
    finally:
        await engine.stop()
    _rows(result, batches, long)


def _note(samples: dict[str, list[float]], name: str, values: dict[str, float]) -> None:
    for key, value in values.items():
        samples.setdefault(f"{name}.{key}", []).append(value)


def _of_answers(answers: list[Answer], new: int) -> dict[str, float]:
    """Of answers that were asked for at once. Decode counts from the moment when all have their first token."""
    first, end = max(a.tokens_at[0] for a in answers), max(a.tokens_at[-1] for a in answers)
    decoded = sum(sum(at > first for at in a.tokens_at) for a in answers)
    began = min(a.asked for a in answers)
    return {
        "tokens_per_s": len(answers) * new / (end - began),
        "decode_tokens_per_s": decoded / (end - first),
        "latency_s": statistics.median(a.total_s for a in answers),
        "latency_p95_s": percentile([a.total_s for a in answers], 0.95),
        "ttft_s": statistics.median(a.ttft_s for a in answers),
    }


def _rows(result: Result, batches: tuple[int, ...], long: int) -> None:
    """Medians, and the ratios that are asked for: each the median over rounds of the quotient within a round."""
    for batch in batches:
        for who in ("engine", "plain"):
            prefix = f"{who}.{batch}."
            row = {k.removeprefix(prefix): statistics.median(v) for k, v in result.samples.items() if k.startswith(prefix)}
            result.rows.append({"who": who, "requests": batch, **row})
        for what in ("tokens_per_s", "decode_tokens_per_s"):
            result.ratios[f"engine_to_plain.{batch}.{what}"] = _quotient(result, f"engine.{batch}.{what}", f"plain.{batch}.{what}")
        one = _quotient(result, f"engine.{batch}.decode_tokens_per_s", "engine.1.decode_tokens_per_s")
        result.ratios[f"engine.{batch}_to_one_by_one.decode_tokens_per_s"] = one
    result.ratios[f"engine_to_plain.prefill_{long}"] = _quotient(result, "plain.prefill_s", "engine.prefill_s")


def _quotient(result: Result, above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(result.samples[above], result.samples[below], strict=True))


def _network(result: Result, running: Any, calls: int) -> None:
    """Milliseconds that one short request takes more through gRPC and through HTTP, some of each in turns, than in process.

    Both ways differ from call to call in what the engine takes, which it reports; so what each takes beyond that is compared.
    """
    import openai

    from protos.concertina.inference.v1 import inference_pb2 as pb
    from protos.concertina.inference.v1 import inference_pb2_grpc as rpc
    from services.system.wire import channel

    request = pb.GenerateRequest(text=SHORT_PROMPT, sampling=pb.Sampling(max_new_tokens=1))
    samples: dict[str, list[float]] = {"grpc.call_ms": [], "grpc.beyond_engine_ms": [], "http.call_ms": []}
    client = openai.OpenAI(base_url=f"{running.http}/v1", api_key="none", max_retries=0)
    with channel(running.inference) as opened:
        stub = rpc.InferenceServiceStub(opened)
        for number in range(-1, -(-calls // CALLS_IN_TURN)):
            for _ in range(CALLS_IN_TURN):
                began = time.perf_counter()
                answer = stub.Generate(request, timeout=60)
                took_ms = 1e3 * (time.perf_counter() - began)
                if number >= 0:
                    samples["grpc.call_ms"].append(took_ms)
                    samples["grpc.beyond_engine_ms"].append(took_ms - answer.timing.total_ms)
            for _ in range(CALLS_IN_TURN):
                began = time.perf_counter()
                client.completions.create(model=running.model, prompt=request.text, max_tokens=1, temperature=0)
                if number >= 0:
                    samples["http.call_ms"].append(1e3 * (time.perf_counter() - began))
    result.samples |= samples
    beyond, own_ms = samples["grpc.beyond_engine_ms"], statistics.median(result.samples["in_process.beyond_engine_ms"])
    engine_ms = statistics.median(samples["grpc.call_ms"]) - statistics.median(beyond)
    result.rows.append({
        "who": "network", "requests": 1, "grpc_overhead_ms": statistics.median(beyond) - own_ms,
        "grpc_overhead_p95_ms": percentile(beyond, 0.95) - own_ms, "engine_ms": engine_ms, "in_process_ms": own_ms,
        "http_overhead_ms": statistics.median(samples["http.call_ms"]) - engine_ms - own_ms,
    })  # fmt: skip


def _vllm(result: Result, model: Any, python: str | None, batches: tuple[int, ...], new: int) -> None:
    """The same requests through vLLM, where there is one."""
    from .vllm_child import measure

    found = measure(model, python, batches, PROMPT_TOKENS, new, result.configuration["dtype"])
    result.configuration["vllm"] = found.get("version") or found["absent"]
    log(f"bench: vLLM {result.configuration['vllm']}")
    for row in found.get("rows", []):
        result.rows.append({"who": "vllm", **row})
        ours = statistics.median(result.samples[f"engine.{row['requests']}.decode_tokens_per_s"])
        result.ratios[f"engine_to_vllm.{row['requests']}.decode_tokens_per_s"] = ours / row["decode_tokens_per_s"]


def plot(result: Result) -> str:
    """Decoded tokens a second over the number of requests, as an SVG."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in result.rows:
        if "decode_tokens_per_s" in row:
            series.setdefault(row["who"], []).append((row["requests"], row["decode_tokens_per_s"]))
    return line_plot(series, title="Decode throughput", x_label="requests at once", y_label="tokens/s", log_x=True, log_y=True)


def render(result: Result) -> str:
    """The tables for people."""
    if result.benchmark == "load":
        from .load import render_load

        return render_load(result)
    lines = [f"{'':8} {'requests':>8} {'tokens/s':>9} {'decode tokens/s':>16} {'latency ms':>11} {'p95 ms':>8} {'first token ms':>15}"]
    for row in result.rows:
        if row["who"] != "network":
            times = (1e3 * row.get(key, float("nan")) for key in ("latency_s", "latency_p95_s", "ttft_s"))
            cells = "{:>11.0f} {:>8.0f} {:>15.0f}".format(*times)
            lines.append(f"{row['who']:8} {row['requests']:>8} {row['tokens_per_s']:>9.1f} {row['decode_tokens_per_s']:>16.1f} {cells}")
        else:
            lines.append(f"gRPC costs {row['grpc_overhead_ms']:.2f} ms a request (p95 {row['grpc_overhead_p95_ms']:.2f}), "
                         f"HTTP {row['http_overhead_ms']:.2f} ms, more than in process: "
                         f"{row['engine_ms']:.1f} ms in the engine and {row['in_process_ms']:.2f} around it")  # fmt: skip
    lines += [f"{name}: {value:.2f}" for name, value in result.ratios.items()]
    lines.append(f"vLLM: {result.configuration['vllm']}")
    return "\n".join(lines)
