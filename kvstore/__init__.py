"""Concertina's library: encoded KV blocks, their codecs, the arena that holds them and the policy that squeezes them.

Nothing here imports Ray, `transformers` or `services`; codecs and eviction need torch (or less) alone.
"""
