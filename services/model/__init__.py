"""Which model to serve: from what a user writes after ``--model`` to a directory that can be loaded, and to its fingerprint.

``python -m services.model`` fetches the default model once (``make setup`` calls it).
"""

from .directory import check, fingerprint
from .resolve import resolve_model

__all__ = ["check", "fingerprint", "resolve_model"]
