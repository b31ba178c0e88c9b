"""Calls from Serve's proxy to a replica of the same host and user, over a Unix socket.

Serve calls replicas over ``grpc.aio``, which takes 1.7 ms to and fro on two cores that were busy with a model until then; frames on a
Unix socket take .3. Both ends stay Serve's own: its stub's place is taken by `calls.Stub`, and `server` hands the same messages to the
same servicer. A replica that has no such socket here, since it is on another host, is called over gRPC as ever.
"""
