"""An index in RocksDB."""

from .backend import RocksdbBackend
from .store import Durability, Memory

__all__ = ["Durability", "Memory", "RocksdbBackend"]
