"""Redis or Valkey: SET and GET of all values in one pipeline, over redis-py with its C parser."""

from __future__ import annotations

import redis

from .base import Store, Values

#: A pipeline is written from one buffer: more at once would measure the memory allocator.
PIPELINE_BYTES = 64 << 20


class Redis(Store):
    """One connection. Values come back as new objects: redis-py has no other way."""

    def __init__(self, values: Values, where: dict) -> None:
        super().__init__(values, where)
        self._redis = redis.Redis.from_url(where["redis"])
        self._names = [b"value:" + key for key in values.keys]
        self._step = max(1, PIPELINE_BYTES // values.size_bytes)

    def put(self) -> None:
        for at in range(0, self.values.count, self._step):
            pipeline = self._redis.pipeline(transaction=False)
            for name, value in zip(self._names[at : at + self._step], self.values.data[at : at + self._step], strict=True):
                pipeline.set(name, value)
            pipeline.execute()

    def get(self) -> list[bytes]:
        found: list[bytes] = []
        for at in range(0, self.values.count, self._step):
            pipeline = self._redis.pipeline(transaction=False)
            for name in self._names[at : at + self._step]:
                pipeline.get(name)
            found += pipeline.execute()
        return found

    def close(self) -> None:
        self._redis.delete(*self._names)
        self._redis.close()
