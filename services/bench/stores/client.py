"""A process that holds values and moves them as it is told: a line ``OPERATION STORE`` on stdin, its begin and end on stdout.

The times are of the machine's monotonic clock, which all processes share, so that those of several clients can be put together.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from kvstore.arena import keep_freed_memory, settle_objects

from . import store_class
from .base import Store, Values


def main(setup: dict[str, Any]) -> None:
    """Serve stdin until it ends.

    Parameters
    ----------
    setup : dict
        ``count``, ``size_bytes`` and ``client`` of `Values`, ``where`` of `Store`, and ``stores``, their names.
    """
    keep_freed_memory()
    values = Values(setup["count"], setup["size_bytes"], setup["client"])
    stores: dict[str, Store] = {name: store_class(name)(values, setup["where"]) for name in setup["stores"]}
    settle_objects()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        operation, name = line.split()
        store = stores[name]
        (store.before_put if operation == "put" else store.before_get)()
        began = time.monotonic()
        result = (store.put if operation == "put" else store.get)()
        ended = time.monotonic()
        del result
        print(json.dumps([began, ended]), flush=True)
    for store in stores.values():
        store.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
