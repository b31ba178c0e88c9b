"""vLLM beside our engine, in a process and, if wanted, an environment of its own. Run as a script it is that process."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TIMEOUT_S = 600
SEED = 0
#: Memory of its KV cache, in GiB; and no look at a hub for a model that is a directory here.
SETTINGS = ("VLLM_CPU_KVCACHE_SPACE=2", "HF_HUB_OFFLINE=1", "VLLM_LOGGING_LEVEL=ERROR")


def measure(model: Path, python: str | None, batches: tuple[int, ...], prompt_tokens: int, new: int, dtype: str) -> dict[str, Any]:
    """``version`` and ``rows`` of vLLM, or why there are none under ``absent``."""
    if python is None and importlib.util.find_spec("vllm") is None:
        return {"absent": "not installed here; name a Python that has it with --vllm-python"}
    asked = {"model": str(model), "batches": batches, "prompt_tokens": prompt_tokens, "new": new, "dtype": dtype}
    # -P: the modules beside this one are no part of that environment.
    command = ["env", *SETTINGS, python or sys.executable, "-P", __file__, json.dumps(asked)]
    try:
        status, said, complaint = _run(command)
        if status:
            return {"absent": f"did not run: {complaint.strip().splitlines()[-1:]}"}
        return json.loads(said.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        return {"absent": f"did not run: {error}"}


def _run(command: list[str]) -> tuple[int, str, str]:
    """Exit status and what it wrote. Whatever happens to us meanwhile, its whole group ends here: it starts processes of its own."""
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        said, complaint = child.communicate(timeout=TIMEOUT_S)
        return child.returncode, said, complaint
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def main(asked: dict[str, Any]) -> dict[str, Any]:
    """The same requests as ours, twice: the first time warms up."""
    import random

    import vllm

    new, draw = asked["new"], random.Random(SEED)
    engine = vllm.LLM(model=asked["model"], dtype=asked["dtype"], enforce_eager=True, max_model_len=2048, enable_prefix_caching=False)
    rows = []
    for batch in asked["batches"]:
        seconds = {}
        for count in (1, new, 1, new):
            sampling = vllm.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
            prompts = [{"prompt_token_ids": [draw.randrange(1000, 40000) for _ in range(asked["prompt_tokens"])]} for _ in range(batch)]
            began = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            seconds[count] = time.perf_counter() - began
        decode = batch * (new - 1) / (seconds[new] - seconds[1])
        rows.append({"requests": batch, "tokens_per_s": batch * new / seconds[new], "decode_tokens_per_s": decode, "ttft_s": seconds[1]})
    return {"version": vllm.__version__, "rows": rows}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
