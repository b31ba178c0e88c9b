"""Certificates of a small authority of our own, made by openssl."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make certificates")


class Authority:
    """Issues certificates into a directory; `ca` is the path of its own."""

    def __init__(self, place: Path) -> None:
        self._place = place
        place.mkdir(exist_ok=True)
        self.ca, self._key = place / "ca.pem", place / "ca.key"
        self._openssl("req", "-x509", *_new_key(self._key), "-days", "2", "-subj", "/CN=test authority", "-out", str(self.ca))

    def issue(self, name: str, alternative: str) -> tuple[str, str]:
        """Paths of a certificate chain and its key for a subject alternative name such as ``IP:127.0.0.1``."""
        key, request, cert, extensions = (self._place / f"{name}.{kind}" for kind in ("key", "csr", "pem", "ext"))
        extensions.write_text(f"subjectAltName={alternative}\n")
        self._openssl("req", *_new_key(key), "-subj", f"/CN={name}", "-out", str(request))
        signed = ["-CA", str(self.ca), "-CAkey", str(self._key), "-CAcreateserial", "-days", "2", "-extfile", str(extensions)]
        self._openssl("x509", "-req", "-in", str(request), *signed, "-out", str(cert))
        return str(cert), str(key)

    @staticmethod
    def _openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _new_key(path: Path) -> list[str]:
    return ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path)]
