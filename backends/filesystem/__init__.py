"""The index as a journal of operations in plain files, held in memory: needs no library at all."""

from .backend import Durability, FilesystemBackend

__all__ = ["Durability", "FilesystemBackend"]
