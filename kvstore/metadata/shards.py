"""Commands to the right server: one Redis, or the primaries of a Redis Cluster, found out by asking.

A command names the key that decides its slot. All commands for one server leave in one write, servers run side by side, and the
whole costs one round trip. Redirections (a slot has moved, or is moving) are followed once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from hiredis import ReplyError
from redis.crc import key_slot

from kvstore.errors import ConcertinaError, TransportError

from .resp import Endpoint, RespConnection, error_of_exception, error_of_reply, open_connection, pack

SLOTS = 16_384
_ASKING = pack("ASKING")


class Shards:
    """Connections to every server of one deployment, opened on use.

    Parameters
    ----------
    endpoint : Endpoint
        The server, or any member of the cluster.
    timeout_s : float
        Deadline of one `run`, connecting included.
    setup : list of bytes
        Packed commands that every new connection runs first.
    """

    def __init__(self, endpoint: Endpoint, timeout_s: float, setup: Sequence[bytes] = ()) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self.round_trips = 0
        self._setup = list(setup)
        self._connections: dict[Endpoint, RespConnection] = {}
        self._opening: dict[Endpoint, asyncio.Task[RespConnection]] = {}
        self._owners: list[Endpoint] | None = None  # of each slot; empty: no cluster; None: not known
        self._members: set[Endpoint] = set()  # owners when last heard, to ask when `endpoint` is gone
        self._closed = False

    async def run(self, commands: Sequence[bytes], keys: Sequence[bytes]) -> list[Any]:
        """The reply of each packed command, in order; ``keys[i]`` decides the slot of ``commands[i]`` (not read without a cluster).

        Raises
        ------
        DeadlineError, TransportError, AuthenticationError, PermissionDeniedError, CapacityError
            When any command cannot be answered; others of the same call may have taken effect.
        """
        async with self._bounded(len(commands)) as used:
            await self._topology()
            return await self._run(commands, keys, used)

    async def ask(self, member: Endpoint, command: bytes) -> Any:
        """The reply of one server to a packed command about all that it holds. Raises as `run` does."""
        async with self._bounded(1) as used:
            (reply,) = await self._send(member, [command], used)
            if isinstance(reply, ReplyError):
                raise error_of_reply(reply)
            return reply

    @asynccontextmanager
    async def _bounded(self, commands: int) -> AsyncIterator[set[Endpoint]]:
        """A deadline for so many commands. Gives a set for the servers that are asked: when one fails, their connections go."""
        used: set[Endpoint] = set()
        try:
            async with asyncio.timeout(self.timeout_s):
                yield used
        except TimeoutError as error:
            self._drop(used)
            raise error_of_exception(error, f"{self.timeout_s:g} s for {commands} commands") from error
        except TransportError:
            self._drop(used)  # a server that was demoted answers READONLY for ever: the next call connects anew
            raise

    async def primaries(self) -> list[Endpoint]:
        """The servers that own slots; empty where there is no cluster. Raises as `run` does."""
        try:
            async with asyncio.timeout(self.timeout_s):
                return list(dict.fromkeys(await self._topology()))
        except TimeoutError as error:
            raise error_of_exception(error, "asking for the topology") from error

    def owner_of(self, key: bytes) -> Endpoint:
        """The server of `key`, as far as known now."""
        return self._owners[key_slot(key)] if self._owners else self.endpoint

    async def close(self) -> None:
        """Drop all connections; later calls raise TransportError."""
        self._closed = True
        for task in self._opening.values():
            task.cancel()
        self._drop(set(self._connections))

    async def _run(self, commands: Sequence[bytes], keys: Sequence[bytes], used: set[Endpoint]) -> list[Any]:
        if self._owners:
            replies = await self._scatter(commands, keys, range(len(commands)), used)
        else:
            replies = await self._send(self.endpoint, commands, used)
        errors = [i for i, reply in enumerate(replies) if isinstance(reply, ReplyError)]
        if errors:
            await self._follow(commands, keys, errors, replies, used)
        for i in errors:
            if isinstance(replies[i], ReplyError) and not str(replies[i]).startswith("NOSCRIPT"):
                raise error_of_reply(replies[i])
        return replies

    async def _send(self, member: Endpoint, commands: Sequence[bytes], used: set[Endpoint]) -> list[Any]:
        used.add(member)
        connection = await self._connection(member)
        self.round_trips += 1
        return await connection.submit(b"".join(commands), len(commands))

    async def _scatter(self, commands: Sequence[bytes], keys: Sequence[bytes], which: Sequence[int], used: set[Endpoint]) -> list[Any]:
        """Send the commands numbered `which` to the owners of their keys, all at once; replies in the order of `which`."""
        groups: dict[Endpoint, list[int]] = {}
        for i in which:
            groups.setdefault(self.owner_of(keys[i]), []).append(i)
        answered = await asyncio.gather(*(self._send(member, [commands[i] for i in g], used) for member, g in groups.items()))
        replies = {i: r for g, part in zip(groups.values(), answered, strict=True) for i, r in zip(g, part, strict=True)}
        return [replies[i] for i in which]

    async def _follow(
        self, commands: Sequence[bytes], keys: Sequence[bytes], errors: list[int], replies: list[Any], used: set[Endpoint]
    ) -> None:
        """Send the redirected commands among `errors` again, once, and put what they then answer into `replies`."""
        moved = [i for i in errors if str(replies[i]).startswith("MOVED ")]
        if moved:
            self._owners = None
            await self._topology()
            for i, reply in zip(moved, await self._scatter(commands, keys, moved, used), strict=True):
                replies[i] = reply
        for i in errors:
            if isinstance(replies[i], ReplyError) and str(replies[i]).startswith("ASK "):
                target = self._member(*str(replies[i]).rsplit(" ", 1)[1].rsplit(":", 1))
                replies[i] = (await self._send(target, [_ASKING, commands[i]], used))[1]

    async def _topology(self) -> list[Endpoint]:
        """The owner of each slot, or an empty list; asked for once, and again after a redirection or a lost connection."""
        if self._owners is None:
            connected = [member for member, connection in self._connections.items() if connection.usable]
            known = list(dict.fromkeys([*connected, self.endpoint, *self._members]))
            for number, member in enumerate(known, 1):
                try:
                    connection = await self._connection(member)
                    (reply,) = await connection.submit(pack("CLUSTER", "SLOTS"), 1)
                except ConcertinaError:
                    if number == len(known):
                        raise
                    continue
                self._owners = [] if isinstance(reply, ReplyError) else self._owners_of(reply, member)
                self._members = set(self._owners)
                break
        return self._owners or []

    def _owners_of(self, slots: list[Any], asked: Endpoint) -> list[Endpoint]:
        owners: list[Endpoint | None] = [None] * SLOTS
        for first, last, primary, *_ in slots:
            host = (primary[0] or b"").decode() or asked.host
            owners[first : last + 1] = [self._member(host, primary[1])] * (last + 1 - first)
        if None in owners:
            raise TransportError("the Redis Cluster does not serve all slots now")
        return owners  # type: ignore[return-value]

    def _member(self, host: str, port: str | int) -> Endpoint:
        return replace(self.endpoint, host=host or self.endpoint.host, port=int(port), path=None)

    async def _connection(self, member: Endpoint) -> RespConnection:
        """An open connection to `member`; callers that come at once share one attempt."""
        connection = self._connections.get(member)
        if connection is not None and connection.usable:
            return connection
        if self._closed:
            raise TransportError("the metadata client is closed")
        task = self._opening.get(member)
        if task is None:
            task = self._opening[member] = asyncio.ensure_future(self._open(member))
            task.add_done_callback(lambda done: self._opened(member, done))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled() and not asyncio.current_task().cancelling():  # type: ignore[union-attr]
                raise TransportError("the metadata client is closed") from None
            raise

    async def _open(self, member: Endpoint) -> RespConnection:
        try:
            async with asyncio.timeout(self.timeout_s):
                return await open_connection(member, self._setup)
        except TimeoutError as error:
            raise error_of_exception(error, f"connecting to {member.path or f'{member.host}:{member.port}'}") from error

    def _opened(self, member: Endpoint, task: asyncio.Task[RespConnection]) -> None:
        self._opening.pop(member, None)
        if task.cancelled() or task.exception() is not None:
            return
        if self._closed:
            task.result().abort()
        else:
            self._connections[member] = task.result()

    def _drop(self, members: set[Endpoint]) -> None:
        """Forget connections, and with them what we believed of the topology: it is asked for again."""
        for member in members & set(self._connections):
            self._connections.pop(member).abort()
        self._owners = None
