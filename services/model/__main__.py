"""Fetch the default model and print its directory."""

import sys

from kvstore.errors import ConcertinaError

from .default import fetch_default

try:
    print(fetch_default())
except ConcertinaError as error:
    sys.exit(f"services.model: {error}")
