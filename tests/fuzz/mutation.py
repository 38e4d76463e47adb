"""Mutations of real inputs: the usual random damage, and the lies that msgpack and HTTP make easy to tell."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import msgspec

_MAX_BYTES = 64 << 10
_NESTING = (64, 2_000, 40_000)

MSGPACK_LIES = (
    b"\xdd\xff\xff\xff\xff",  # an array of 4 billion items
    b"\xdd\x7f\xff\xff\xff",
    b"\xdc\xff\xff",
    b"\xdf\xff\xff\xff\xff",  # a map
    b"\xc6\xff\xff\xff\xff",  # bytes
    b"\xdb\xff\xff\xff\xff",  # a string
    b"\xc9\xff\xff\xff\xff\x01",  # an extension
    b"\xcf\xff\xff\xff\xff\xff\xff\xff\xff",  # the largest integer
    b"\xd3\x80\x00\x00\x00\x00\x00\x00\x00",  # the smallest
    b"\xcb\x7f\xf0\x00\x00\x00\x00\x00\x00",  # infinity
    b"\xcb\x7f\xf8\x00\x00\x00\x00\x00\x00",  # no number
    b"\xcb\xff\xef\xff\xff\xff\xff\xff\xff",
    b"\xc0",
    b"\xc1",  # never used
    b"\xc3",
    b"\x80",
    b"\x90",
    b"\xa0",
    b"\xc4\x00",
    b"\xa2\xff\xfe",  # a string that is not UTF-8
    b"\xd7\xff\x00\x00\x00\x00\xff\xff\xff\xff",  # a timestamp
)
HTTP_LIES = (
    b"\r\n",
    b"\n",
    b"\r",
    b"\x00",
    b" ",
    b"\t",
    b":",
    b"%00",
    b"%ff%fe",
    b"../",
    b"?a=1&a=2",
    b"#",
    b"Content-Length: 99999999999999999999\r\n",
    b"Content-Length: -1\r\n",
    b"Content-Length: 5\r\nContent-Length: 6\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"Transfer-Encoding: chunked, identity\r\n",
    b"Content-Encoding: gzip\r\n",
    b"Content-Encoding: deflate\r\n",
    b"Expect: 100-continue\r\n",
    b"Upgrade: websocket\r\nConnection: upgrade\r\n",
    b"Connection: close\r\n",
    b"Accept: application/msgpack;q=inf\r\n",
    b"Accept: */*;q=nan, application/msgpack\r\n",
    b"Content-Type: application/msgpack\r\n",
    b"Content-Type: ;;;\r\n",
    b"Host: \xff\r\n",
    b"ffffffffffffffff\r\n",
    b"0\r\n\r\n",
    b"HTTP/9.9",
    b"HTTP/0.9",
    b"GET / HTTP/1.1\r\n\r\n",
    b"\xf0\x9f\x98\x80",
    b"[" * 2000,
    b'{"a":' * 2000,
    b"1e999",
    b"-",
    b"null",
    b'"\\ud800"',
)
ODD_VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "GPU", "CPU", "\x00", "é" * 300, "a" * 5000, b"", b"\x00" * 8, b"\xff" * 32, b"x" * 240,
    b"x" * 241, [], [[]], [None] * 100, [0] * 5000, list(range(2000)), {}, {"type": "BlockStored"}, {1: 2},
    "BlockStored", "BlockRemoved", "AllBlocksCleared", "BlockFrobbed", "type", msgspec.msgpack.Ext(5, b"abc"),
)  # fmt: skip


class Mutator:
    """Makes inputs out of `seeds`. The same seed number gives the same inputs in the same order.

    `packed`: the seeds are msgpack, and half of the inputs have damaged values in sound packing.
    """

    def __init__(self, seeds: Sequence[bytes], lies: Sequence[bytes], seed: int, *, packed: bool = False) -> None:
        self._seeds = seeds
        self._lies = lies
        self._packed = packed
        self._random = random.Random(seed)

    def next(self) -> bytes:
        """The next input: a seed after one to eight mutations."""
        rng = self._random
        if self._packed and rng.random() < 0.5:
            return self._with_odd_values()
        data = bytearray(rng.choice(self._seeds))
        for _ in range(1 << max(0, rng.randrange(-2, 4))):
            self._mutate(data)
        del data[_MAX_BYTES:]
        return bytes(data)

    def _mutate(self, data: bytearray) -> None:  # noqa: C901 - a flat choice of damages
        rng = self._random
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + 1 + int(rng.expovariate(1 / 8)))
        kind = rng.randrange(11)
        if kind == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at:end]
        elif kind == 3:
            data[at:at] = rng.randbytes(1 + int(rng.expovariate(1 / 4)))
        elif kind == 4:
            data[at:at] = data[at:end] * rng.randrange(1, 20)
        elif kind == 5:
            del data[at:]
        elif kind == 6:
            data[at:end] = rng.choice(self._lies)
        elif kind == 7:
            data[at:at] = rng.choice(self._lies)
        elif kind == 8:
            other = rng.choice(self._seeds)
            begin = rng.randrange(len(other) + 1)
            data[at:end] = other[begin : begin + rng.randrange(1, 200)]
        elif kind == 9:
            other = rng.choice(self._seeds)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        elif rng.random() < 0.05:
            data[at:at] = rng.choice((b"\x91", b"\x81\xa1a", b"[", b"\xdc\x00\x01")) * rng.choice(_NESTING)

    def _with_odd_values(self) -> bytes:
        """Values exchanged, dropped, added or moved in what a seed unpacks to."""
        rng = self._random
        tree = msgspec.msgpack.decode(rng.choice(self._seeds))
        for _ in range(rng.randrange(1, 4)):
            inner = self._inner(tree)
            if isinstance(inner, dict) and inner:
                self._damage_map(inner)
            elif isinstance(inner, list):
                self._damage_list(inner)
        return msgspec.msgpack.encode(tree)

    def _inner(self, tree: Any) -> Any:
        """Some list or map of the tree."""
        rng = self._random
        while True:
            below = [one for one in (tree.values() if isinstance(tree, dict) else tree) if isinstance(one, list | dict)]
            if not below or rng.random() < 0.2:
                return tree
            tree = rng.choice(below)

    def _odd_value(self) -> Any:
        return deepcopy(self._random.choice(ODD_VALUES))

    def _damage_map(self, inner: dict[Any, Any]) -> None:
        rng = self._random
        key = rng.choice(list(inner))
        kind = rng.randrange(4)
        if kind == 0:
            del inner[key]
        elif kind == 1:
            inner[rng.choice(("x", "medium", "group_idx", "lora_name", "extra_keys", 7))] = self._odd_value()
        else:
            inner[key] = self._odd_value()

    def _damage_list(self, inner: list[Any]) -> None:
        rng = self._random
        at = rng.randrange(len(inner) + 1)
        kind = rng.randrange(4)
        if kind == 0:
            inner.insert(at, self._odd_value())
        elif kind == 1 and at < len(inner):
            del inner[at]
        elif kind == 2 and at < len(inner):
            inner.extend([inner[at]] * rng.randrange(50))
        elif at < len(inner):
            inner[at] = self._odd_value()
