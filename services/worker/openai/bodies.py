"""OpenAI's objects: models, whole answers, and the chunks of streamed ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from services.engine.base import Delta


def models(names: list[str], created: int) -> dict[str, Any]:
    """What ``/v1/models`` says."""
    return {"object": "list", "data": [model(name, created) for name in names]}


def model(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "concertina"}


def usage(lasts: list[Delta]) -> dict[str, Any]:
    """Token counts of all answers of one call, from their last deltas."""
    prompt, completion = sum(d.prompt_tokens for d in lasts), sum(d.completion_tokens for d in lasts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(d.cache.cached_tokens for d in lasts)},
    }


@dataclass(frozen=True, slots=True)
class Completion:
    """Objects of one call of ``/v1/completions``; `created` in seconds since the epoch."""

    id: str
    created: int
    model: str

    def whole(self, answers: list[Delta]) -> dict[str, Any]:
        """All answers at once, in the order of their prompts."""
        return self._object([self._choice(i, d.text, d.finish_reason) for i, d in enumerate(answers)]) | {"usage": usage(answers)}

    def opening(self) -> list[dict[str, Any]]:
        """Chunks that come before any text."""
        return []

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        """Chunks for one delta of the answer to prompt `index`."""
        if not delta.text and not delta.finish_reason:
            return []
        return [self._object([self._choice(index, delta.text, delta.finish_reason or None)])]

    def closing(self, lasts: list[Delta]) -> dict[str, Any]:
        """The chunk that carries usage alone."""
        return self._object([]) | {"usage": usage(lasts)}

    def _object(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"cmpl-{self.id}", "object": "text_completion", "created": self.created, "model": self.model, "choices": choices}

    @staticmethod
    def _choice(index: int, text: str, reason: str | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": reason}


@dataclass(frozen=True, slots=True)
class Chat:
    """The same for ``/v1/chat/completions``, which has one answer."""

    id: str
    created: int
    model: str

    def whole(self, answers: list[Delta]) -> dict[str, Any]:
        message = {"role": "assistant", "content": answers[0].text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": answers[0].finish_reason}
        return self._object("chat.completion", [choice]) | {"usage": usage(answers)}

    def opening(self) -> list[dict[str, Any]]:
        return [self._chunk({"role": "assistant", "content": ""}, None)]

    def chunks(self, index: int, delta: Delta) -> list[dict[str, Any]]:
        made = [self._chunk({"content": delta.text}, None)] if delta.text else []
        return made + ([self._chunk({}, delta.finish_reason)] if delta.finish_reason else [])

    def closing(self, lasts: list[Delta]) -> dict[str, Any]:
        return self._object("chat.completion.chunk", []) | {"usage": usage(lasts)}

    def _chunk(self, delta: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return self._object("chat.completion.chunk", [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {"id": f"chatcmpl-{self.id}", "object": kind, "created": self.created, "model": self.model, "choices": choices}
