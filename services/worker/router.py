"""Which replica a request goes to: the one that had its prefix, unless that one has much more to do than another.

Over gRPC `services.worker.proxy` names the prefix. HTTP bodies are not there yet when Serve chooses, so there a caller may name a session
(header ``x-session-id``), and is spread otherwise. Either way the store gives a replica what another has computed.
"""

from __future__ import annotations

from typing import Any

from ray.serve._private.common import RunningReplicaInfo
from ray.serve.request_router import LocalityMixin, PendingRequest, ReplicaID, RequestRouter, RunningReplica

from kvstore.clock import SystemClock
from services.worker.prefixes import Memory
from services.worker.same_host.calls import SameHostReplica

#: Requests that the preferred replica may have beyond the least loaded one.
MAX_LEAD = 4


class PrefixRouter(LocalityMixin, RequestRouter):
    """Who had the prefix; then two at random, of which Serve takes the one with less to do. One object in each proxy.

    Serve's own router of two choices hands a replica to the first request in line, whichever it was chosen for; so it is no base here.
    """

    def initialize_state(self, **kwargs: Any) -> None:
        self._memory: Memory[ReplicaID] = Memory()
        self._rng = SystemClock().rng

    def create_replica_wrapper(self, replica_info: RunningReplicaInfo) -> RunningReplica:
        """How a replica is called."""
        return SameHostReplica(replica_info)

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Ranks of replicas, the preferred first."""
        near = [self._replicas[id_] for id_ in self.apply_locality_routing(pending_request=pending_request) if id_ in self._replicas]
        ranks = [self._rng.sample(near, min(2, len(near)))] if near else []
        trail = pending_request.metadata.session_id if pending_request else ""
        holder = self._memory.holder(trail) if trail else None
        preferred = next((r for r in candidate_replicas if r.replica_id == holder), None)
        if preferred is None or self._leads(preferred, candidate_replicas):
            return ranks
        return [[preferred], *ranks]

    async def _choose_replica_for_request(self, pending_request: PendingRequest, *, is_retry: bool = False) -> RunningReplica:
        """At once, where nobody waits and a replica is known to have room: Serve itself starts a task to choose, and keeps gauges of it.

        A Serve that does not call this asks `choose_replicas` alone, and chooses the same.
        """
        if not is_retry and self.num_pending_requests == 0:
            replicas = list(self.curr_replicas.values())
            for rank in [replicas] if len(replicas) == 1 else await self.choose_replicas(replicas, pending_request):
                lengths = ((self.replica_queue_len_cache.get(replica.replica_id), replica) for replica in rank)
                free = [(length, replica) for length, replica in lengths if length is not None and length < replica.max_ongoing_requests]
                if free:
                    return min(free, key=lambda pair: pair[0])[1]
        return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        if pending_request.metadata.session_id:
            self._memory.note(pending_request.metadata.session_id, replica_id)

    def _leads(self, preferred: RunningReplica, replicas: list[RunningReplica]) -> bool:
        """Whether it has much more to do than the least loaded; what is not known counts as nothing to do."""
        lengths = {r.replica_id: self.replica_queue_len_cache.get(r.replica_id) or 0 for r in replicas}
        return lengths[preferred.replica_id] - min(lengths.values()) > MAX_LEAD
