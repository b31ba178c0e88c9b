"""How both ends of a gRPC channel are set up for megabytes rather than for small messages."""

from __future__ import annotations

#: HTTP/2 cuts a message into frames of 16 KiB unless told otherwise, and gRPC reads the socket in pieces of 8 KiB at first: too many
#: steps for a message of a MiB.
BULK_OPTIONS: tuple[tuple[str, int | str], ...] = (
    ("grpc.optimization_target", "throughput"),
    ("grpc.http2.max_frame_size", (16 << 20) - 1),
    ("grpc.http2.lookahead_bytes", 8 << 20),
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.write_buffer_size", 8 << 20),
    ("grpc.experimental.tcp_read_chunk_size", 2 << 20),
    ("grpc.experimental.tcp_min_read_chunk_size", 1 << 20),
    ("grpc.experimental.tcp_max_read_chunk_size", 8 << 20),
)
