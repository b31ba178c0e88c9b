"""Prometheus' scrape targets (file_sd, on stdout) from ``concertina status --json`` (on stdin)."""

from __future__ import annotations

import json
import sys


def targets(status: dict) -> list[dict]:
    """One group for nodes and one for workers; those without a metrics page are left out."""
    groups = []
    for role in ("nodes", "workers"):
        addresses = [member["metrics"].removeprefix("http://").removesuffix("/metrics") for member in status[role] if member["metrics"]]
        groups.append({"targets": addresses, "labels": {"role": role.removesuffix("s"), "system": status["name"]}})
    return groups


if __name__ == "__main__":
    json.dump(targets(json.load(sys.stdin)), sys.stdout, indent=2)
    print()
