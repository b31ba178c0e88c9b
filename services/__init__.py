"""Concertina's processes and faces: workers under Ray Serve, the engines inside them, the command line."""
