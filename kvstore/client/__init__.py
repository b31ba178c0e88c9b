"""What a worker, a connector and the commands use of the store: `KvClient`."""

from .admin import Admin
from .client import KvClient
from .config import ClientConfig
from .lookup import Hit
from .prefix import Fetched
from .sections import Sections
from .transport import GrpcTransport, Transport

__all__ = ["Admin", "ClientConfig", "Fetched", "GrpcTransport", "Hit", "KvClient", "Sections", "Transport"]
