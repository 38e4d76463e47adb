"""The index in an LMDB file: survives the process, and is read by other processes while it is written."""

from .backend import LmdbBackend
from .files import Durability
from .reader import LmdbReader

__all__ = ["Durability", "LmdbBackend", "LmdbReader"]
