"""OpenAI-compatible HTTP on the same deployment as the gRPC service.

A body becomes the same `GenerateRequest` that gRPC carries (`parse`), so that one module checks what both ask for; deltas become
OpenAI's objects and events (`bodies`), and errors its error object with the HTTP status (`errors`). `http` puts them together.
"""
