"""Names of blocks: a chain of hashes over contents, as an engine makes them."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import msgspec


class Identity(msgspec.Struct, frozen=True):
    """What besides its tokens tells a prompt from another: adapter number, 0 for none, and cache salt, "" for none."""

    adapter: int = 0
    salt: str = ""


def chain_hashes(identity: Identity, contents: Sequence[int], hash_bytes: int) -> list[bytes]:
    """The hash of each block, over itself and all before it, `hash_bytes` long.

    The last 8 bytes are those of the shorter hash: an engine shows the same block either way.
    """
    above = f"{identity.adapter}/{identity.salt}".encode()
    hashes = []
    for content in contents:
        above = blake2b(above + content.to_bytes(4, "big"), digest_size=32).digest()
        hashes.append(above[-hash_bytes:])
    return hashes
