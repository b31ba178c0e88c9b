"""A forward's launches, recorded once and replayed (a CUDA graph).

Python takes longer to launch a layer's kernels than a GPU to run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from kvstore.errors import ConcertinaError
from services.engine.live import LiveKV

if TYPE_CHECKING:
    from services.engine.runner import Runner

#: Times that a forward runs before it is recorded, so that nothing is compiled, loaded or set up while it is.
WARM_UP = 2
log = logging.getLogger(__name__)


class Recording:
    """One forward, over tensors that stay where they are."""

    def __init__(self, graph: torch.cuda.CUDAGraph, logits: torch.Tensor) -> None:
        self._graph, self._logits = graph, logits

    def replay(self) -> torch.Tensor:
        """Its logits [rows, vocabulary], good until it is replayed again. Runs on the caller's stream."""
        self._graph.replay()
        return self._logits


class Recorder:
    """Makes recordings that share memory: they are replayed one after the other."""

    def __init__(self) -> None:
        self._memory, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def record(self, launch: Callable[[], torch.Tensor]) -> Recording:
        """Record what `launch` launches for the logits that it gives. Raises RuntimeError where it waits for the device."""
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(WARM_UP):
                launch()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads may use the device meanwhile.
            with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
                logits = launch()
        except RuntimeError:
            torch.cuda.set_stream(current)  # a recording that fails leaves this thread on its stream
            raise
        return Recording(graph, logits)


@torch.inference_mode()
def use_recordings(runner: Runner, vocab_size: int, tokens: int) -> None:
    """Have `runner` replay its forwards over caches of up to `tokens`, if that gives the bits of launching them; else say why not."""
    forwards = runner.forwards
    if forwards is None or not runner.shapes.prefill:
        return
    try:
        with torch.cuda.device(runner.device):
            runner.record(tokens)
        replayed, launched = _sample(runner, vocab_size, True), _sample(runner, vocab_size, False)
        agree = all(map(torch.equal, replayed, launched))
    except (RuntimeError, ConcertinaError) as error:  # what torch raises for a model that waits for the device
        log.warning("forwards cannot be replayed and are launched each time: %s", error)
        agree = False
    else:
        if not agree:
            log.warning("replayed forwards give other bits than launched ones, and are not used")
    if not agree:
        forwards.forget()
    forwards.replays = True


def _sample(runner: Runner, vocab_size: int, replays: bool) -> list[torch.Tensor]:
    """What a prompt of more than a tile and a token after it give: logits, and K and V of each layer."""
    from services.engine.runner import NextToken, PromptTile  # which imports this package

    runner.forwards.replays = replays
    size, kv = runner.tile, LiveKV(runner.pool)
    count = min(runner.shapes.prefill, size + size // 2)
    prompt = [7 * place % vocab_size for place in range(count)]
    try:
        tiles = [PromptTile(kv, at, prompt[at : at + size], logits=True) for at in range(0, count, size)]
        found = [runner.prefill(tiles), runner.decode([NextToken(kv, 0, count)])]
        return found + [x.clone() for layer in range(kv.layout.layers) for x in kv.layer(layer, kv.length)]
    finally:
        kv.release()
