"""One question to a worker, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass

import grpc

from protos.concertina.inference.v1 import inference_pb2 as pb
from protos.concertina.inference.v1 import inference_pb2_grpc as rpc
from services.system.wire import OPTIONS, translated

TIMEOUT_S = 120.0
ANSWER_TOKENS = 12


@dataclass(frozen=True, slots=True)
class Answer:
    """Times in milliseconds, sizes in bytes; `raw_bytes` is what the cached tokens take uncompressed, at 2 bytes a value."""

    text: str
    tokens: tuple[int, ...]
    prompt_tokens: int
    cached_tokens: int
    bytes_fetched: int
    raw_bytes: int
    ttft_ms: float

    @property
    def ratio(self) -> float:
        """Of compression, as fetched; 0 where nothing was."""
        return self.raw_bytes / self.bytes_fetched if self.bytes_fetched else 0.0


class Client:
    """Asks the worker at one address, greedily."""

    def __init__(self, address: str) -> None:
        self.address = address
        self._channel = grpc.insecure_channel(address, options=OPTIONS)
        self._stub = rpc.InferenceServiceStub(self._channel)
        self._info: pb.GetModelInfoResponse | None = None

    def close(self) -> None:
        self._channel.close()

    def ask(self, prompt: str, *, bypass: bool = False) -> Answer:
        """One answer; with `bypass` without the store. Raises the error of ours that the worker's status stands for."""
        request = pb.GenerateRequest(text=prompt, sampling=pb.Sampling(max_new_tokens=ANSWER_TOKENS, ignore_eos=True))
        request.cache.mode = pb.CACHE_MODE_BYPASS if bypass else pb.CACHE_MODE_USE
        try:
            if self._info is None:
                self._info = self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=TIMEOUT_S)
            answer = self._stub.Generate(request, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise translated(error, self.address) from error
        info = self._info
        return Answer(
            text=answer.text,
            tokens=tuple(answer.tokens),
            prompt_tokens=answer.usage.prompt_tokens,
            cached_tokens=answer.usage.cached_tokens,
            bytes_fetched=answer.cache.bytes_fetched,
            raw_bytes=answer.usage.cached_tokens * info.layers * info.kv_heads * info.head_dim * 2 * 2,
            ttft_ms=answer.timing.ttft_ms,
        )
