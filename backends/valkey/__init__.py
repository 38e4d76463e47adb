"""The index on a Valkey or Redis server: it survives the daemon and its machine, and others read it meanwhile."""

from .backend import ValkeyBackend

__all__ = ["ValkeyBackend"]
