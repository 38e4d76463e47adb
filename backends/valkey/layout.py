"""How the index lies on a server.

Every key of an index starts with `{NAMESPACE/PART}`, a hash tag: in a cluster all of it lies in one slot, so one
transaction changes it and one transaction reads it. Rows, links and small tables are those of `lmdb.rows`.

    …:b:0 to …:b:255   hashes      row key -> row. The bucket is the CRC-32 of the row key, modulo 256
    …:links            sorted set  link keys, all of score 0, so in the order of their bytes
    …:places, counts, scopes, dead, streams   hashes, the small tables
    …:meta             hash        numbers, and: schema, instance, session, commit, attempt
    …:lease            string      who writes, for as long as it says so

    NAMESPACE:parts    set         the names of all parts, in a slot of its own; only grows

Numbers of rows differ from one index to another, the bytes of a row do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, cast
from zlib import crc32

from ..lmdb.catalog import Tables

BUCKETS = 256
"""Hashes over which the rows lie: 10 million rows are 39 thousand each, read within 20 ms for a snapshot."""

SCHEMA = b"1"
"""Version of everything above. An index of another version is refused."""

VERSION = b"places_version"
"""The number in `meta` that changes with the places."""

TABLES = Tables(*cast("tuple[Any, ...]", Tables._fields))
"""The small tables, by name: what a catalog asks of `lmdb` by handles it asks of a server by these."""

Command = tuple[Any, ...]


class Keys:
    """The names of one index."""

    def __init__(self, namespace: str, part: str) -> None:
        start = f"{{{namespace}/{part}}}:"
        self.buckets = tuple(f"{start}b:{number}".encode() for number in range(BUCKETS))
        self.tables = {name: f"{start}{name}".encode() for name in Tables._fields if name != "blocks"}
        self.meta = self.tables["meta"]
        self.places = self.tables["places"]
        self.links = f"{start}links".encode()
        self.lease = f"{start}lease".encode()

    def fetch(self, keys: Sequence[bytes]) -> tuple[list[Command], list[list[bytes]]]:
        """Commands that read rows, and the keys that each of them asks for."""
        if len(keys) == 1:
            return [("HMGET", self.buckets[bucket_of(keys[0])], keys[0])], [[keys[0]]]
        groups = by_bucket(keys)
        asked = [(name, group) for name, group in zip(self.buckets, groups) if group]
        return [("HMGET", name, *group) for name, group in asked], [group for _, group in asked]


def parts_key(namespace: str) -> bytes:
    """The key of the set of parts."""
    return f"{namespace}:parts".encode()


def bucket_of(key: bytes) -> int:
    """The number of the hash that a row lies in."""
    return crc32(key) % BUCKETS


def by_bucket(keys: Iterable[bytes]) -> list[list[bytes]]:
    """Row keys by bucket."""
    groups: list[list[bytes]] = [[] for _ in range(BUCKETS)]
    for key in keys:
        groups[crc32(key) % BUCKETS].append(key)
    return groups


def found_rows(groups: list[list[bytes]], replies: Iterable[list[bytes | None]]) -> dict[bytes, bytes]:
    """The rows that there are, from the replies to the commands of `Keys.fetch`."""
    found: dict[bytes, bytes] = {}
    for group, values in zip(groups, replies):
        found.update([(key, row) for key, row in zip(group, values) if row is not None])
    return found


def pairs(flat: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    """A reply to HGETALL as keys with their values."""
    return zip(flat[::2], flat[1::2])
