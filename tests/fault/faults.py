"""The table of all faults. One row makes one kind; `make fault` repeats each, `make test` some of them once."""

from __future__ import annotations

import random
import signal

from . import door_faults, node_faults, proxy, redis_faults, spill_faults, wire_faults
from .base import Fault
from .proxy import DOWN, UP

_rng = random.Random(20261124)

#: Name -> fault.
FAULTS: dict[str, Fault] = {
    # store nodes
    "node killed in put": node_faults.Kill("put"),
    "node killed in get": node_faults.Kill("get"),
    "node killed in demote": node_faults.Kill("pressure"),
    "node restarted at its address": node_faults.Kill("mixed", same_address=True),
    "node's address inherited": node_faults.Inherit(),
    "node drained": node_faults.Drain(),
    "node stopped in put": node_faults.Stop("put"),
    "node stopped in get": node_faults.Stop("get"),
    "node stopped in demote": node_faults.Stop("pressure"),
    "node stopped until forgotten": node_faults.Stop("mixed", lasts_s=2.6),
    "node stutters": node_faults.Stutter(),
    "node's address taken twice": node_faults.SameAddress(),
    "node impersonated": node_faults.Impostor(),
    "node out of file descriptors": node_faults.NoFiles(),
    "node crowded by idle connections": node_faults.Crowd(),
    "bits flip in the arena": node_faults.FlipArena(),
    "arena full": node_faults.Full(),
    "arena full of pins": node_faults.FullOfPins(),
    "all blocks cleared": node_faults.ClearAll(),
    "node's clocks jump": node_faults.JumpingClock(),
    # Redis
    "redis killed": redis_faults.Kill(),
    "redis stopped": redis_faults.Stop(),
    "redis flushed": redis_faults.Command(("FLUSHALL",)),
    "redis scripts flushed": redis_faults.Command(("SCRIPT", "FLUSH")),
    "redis out of memory": redis_faults.Command(("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "SET", "maxmemory", "0")),
    "redis read-only": redis_faults.Command(("REPLICAOF", "127.0.0.1", "1"), ("REPLICAOF", "NO", "ONE")),
    "redis cuts its clients": redis_faults.Command(("CLIENT", "KILL", "TYPE", "normal")),
    "redis failover to an empty one": redis_faults.FailOver(stale=False),
    "redis failover to a stale replica": redis_faults.FailOver(stale=True),
    "redis refuses": redis_faults.Refuse(),
    "redis late": redis_faults.Between(proxy.delay(0.2)),
    "redis later than anyone waits": redis_faults.Between(proxy.delay(1.0), lasts_s=1.2),
    "redis half-open": redis_faults.Between(proxy.black_hole(UP, DOWN)),
    "redis silent": redis_faults.Between(proxy.black_hole(DOWN)),
    "redis answers another question": redis_faults.Between(proxy.previous_answer()),
    "redis answers garbage": redis_faults.Between(proxy.answer_with(lambda data: _rng.randbytes(len(data)))),
    "redis answers cut short": redis_faults.Between(proxy.truncate(DOWN, 4000)),
    "redis answers in pieces out of order": redis_faults.Between(proxy.shuffle(_rng, DOWN, 0.3)),
    "redis answers twice": redis_faults.Between(proxy.repeat(_rng, DOWN, 0.3)),
    "redis answers with flipped bits": redis_faults.Between(proxy.flip(_rng, DOWN, 0.5)),
    # the wire to a node
    "wire cut in put": wire_faults.Cut("put"),
    "wire cut in get": wire_faults.Cut("get"),
    "wire slow": wire_faults.Between(proxy.delay(0.05)),
    "wire half-open": wire_faults.Between(proxy.black_hole(UP, DOWN)),
    "wire silent": wire_faults.Between(proxy.black_hole(DOWN)),
    "wire deaf": wire_faults.Between(proxy.black_hole(UP), "put"),
    "wire truncated in get": wire_faults.Between(proxy.truncate(DOWN, 300_000), "get"),
    "wire truncated in put": wire_faults.Between(proxy.truncate(UP, 300_000), "put"),
    "wire reorders": wire_faults.Between(proxy.shuffle(_rng, DOWN, 0.1), "get"),
    "wire repeats": wire_faults.Between(proxy.repeat(_rng, DOWN, 0.1), "get"),
    "wire loses": wire_faults.Between(proxy.lose(_rng, DOWN, 0.1), "get"),
    "bits flip on the wire in get": wire_faults.Between(proxy.flip(_rng, DOWN, 0.3), "get"),
    "a path that is no text": wire_faults.BadPath(),
    "bits flip on the wire in put": wire_faults.Between(proxy.flip(_rng, UP, 0.3), "put"),
    # the door, and shared memory
    "door cut in put": wire_faults.Cut("put", "tcp"),
    "door cut in get": wire_faults.Cut("get", "tcp"),
    "door half-open": wire_faults.Between(proxy.black_hole(UP, DOWN), way="tcp"),
    "door truncated in get": wire_faults.Between(proxy.truncate(DOWN, 300_000), "get", "tcp"),
    "door reorders": wire_faults.Between(proxy.shuffle(_rng, DOWN, 0.1), "get", "tcp"),
    "door repeats": wire_faults.Between(proxy.repeat(_rng, DOWN, 0.1), "get", "tcp"),
    "door loses": wire_faults.Between(proxy.lose(_rng, DOWN, 0.1), "get", "tcp"),
    "bits flip at the door in get": wire_faults.Between(proxy.flip(_rng, DOWN, 0.3), "get", "tcp"),
    "bits flip at the door in put": wire_faults.Between(proxy.flip(_rng, UP, 0.3), "put", "tcp"),
    "bits flip in shared memory": node_faults.FlipArena("local"),
    "shared memory under pressure": node_faults.Full("local"),
    "node killed under a reader of its memory": node_faults.Kill("get", way="local"),
    "node killed at its door in put": node_faults.Kill("put", way="tcp"),
    "node stopped under a reader of its memory": node_faults.Stop("get", way="local"),
    "bits flip in a writer's shared memory": door_faults.FlipStage(),
    "node killed under a writer to its memory": node_faults.Kill("put", way="local"),
    "node stopped under a writer to its memory": node_faults.Stop("put", way="local"),
    "slow reader of shared memory": door_faults.SlowReader(),
    "guest of the door stands still in put": door_faults.StillGuest(),
    # the disk behind an arena
    "bits flip in the spill": spill_faults.Flip(),
    "spill cut short": spill_faults.Truncate(),
    "spill's files are each other's": spill_faults.Swap(),
    "spill gone": spill_faults.Remove(),
    "spill full": spill_faults.Full(),
    "node killed while it spills": spill_faults.Kill(),
    # clients
    "slow reader of pages used again": wire_faults.SlowReader(),
    "corrupt put": wire_faults.CorruptPut(),
    "client killed in put": wire_faults.Client("put", signal.SIGKILL),
    "client killed in get": wire_faults.Client("get", signal.SIGKILL),
    "client killed in demote": wire_faults.Client("pressure", signal.SIGKILL),
    "client stopped in get": wire_faults.Client("get", signal.SIGSTOP),
}
