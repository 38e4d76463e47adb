"""The pages of an LMDB 0.9 file, read and checked without LMDB.

LMDB trusts what it maps: a page that lies can end the process with SIGBUS or SIGABRT, and a file that was cut is found
out only when somebody asks for the missing part. What is checked here first cannot do that.

    file   := meta page 0, meta page 1, pages; the meta page with the higher transaction number counts
    meta   := header (16)  magic (4) version (4) address (8) map size (8)  tree of free pages (48)  tree of tables (48)
              last page (8)  transaction (8)
    tree   := pad (4; of the first one: the page size) flags (2) depth (2) branch pages (8) leaf pages (8)
              overflow pages (8) entries (8) root (8; all ones for an empty tree)
    header := page (8) pad (2) flags (2) lower (2) upper (2); an overflow page has its number of pages for the last two
    node   := low (2) high (2) flags (2) key size (2) key, then the data of a leaf, or (8) where it begins elsewhere.
              The place of each node in its page (2) stands after the header. low, high and flags of a branch node are
              the page below it.

All numbers are little-endian, as the machines are that this runs on.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from operator import lt
from struct import Struct, unpack_from
from typing import Any, NamedTuple

MAGIC = 0xBEEFC0DE
VERSION = 1
NO_PAGE = (1 << 64) - 1

_META = Struct("<16xIIQQ48s48sQQ")
_TREE = Struct("<IHHQQQQQ")
_HEADER = Struct("<QHHHH")
_NODE = Struct("<HHHH")
_PAGE = Struct("<Q")
_FIRST_PAGE = 2
_HEADER_SIZE = 16
_NODE_SIZE = 8

_BRANCH, _LEAF, _OVERFLOW, _META_PAGE = 1, 2, 4, 8
_BIG, _TABLE = 1, 2
_INTEGER_KEYS, _OPENED_AS_FILE = 0x8, 0x4000
_MAX_BYTES = 1 << 47
"""All that a process can map."""
_MAX_DEPTH = 32
_MAX_KEY = 511
Rank = Any
"""What keys are ordered by: bytes, or the number that they are. None for no bound."""
Order = Callable[[bytes], Rank]
Note = Callable[[bytes, int, bytes], str | None]
"""Takes key, flags and data of a node, and says what is wrong with it."""

_PAGE_SIZES = frozenset(1 << power for power in range(9, 17))


class Finding(NamedTuple):
    """One thing that is wrong: where, and what."""

    where: str
    what: str


class Tree(NamedTuple):
    """What a file says of one B-tree."""

    pad: int
    flags: int
    depth: int
    branch_pages: int
    leaf_pages: int
    overflow_pages: int
    entries: int
    root: int


class Meta(NamedTuple):
    """One meta page."""

    page_size: int
    free: Tree
    main: Tree
    last_page: int
    txn: int


class Unreadable(Exception):
    """There is no use in looking further. The message says why."""


class UnknownVersion(Unreadable):
    """The file is of another LMDB."""


def read_metas(file: int) -> tuple[Meta, Meta]:
    """Both meta pages, which agree with each other. Raises Unreadable."""
    first = _read_meta(file, 0, 0)
    second = _read_meta(file, 1, first.page_size)
    older, newer = sorted((first, second), key=lambda meta: meta.txn)
    if newer.txn - older.txn > 1 or any(meta.txn and meta.txn & 1 != at for at, meta in enumerate((first, second))):
        raise Unreadable(f"the meta pages are of transactions {first.txn} and {second.txn}, which cannot be")
    if newer.page_size != older.page_size or newer.last_page < older.last_page:
        raise Unreadable("the meta pages contradict each other")
    return older, newer


def _read_meta(file: int, at: int, page_size: int) -> Meta:
    raw = os.pread(file, _META.size, at * page_size)
    if len(raw) < _META.size:
        raise Unreadable(f"the file ends within meta page {at}")
    magic, version, _, _, free, main, last_page, txn = _META.unpack(raw)
    number, _, flags, _, _ = _HEADER.unpack_from(raw)
    if magic != MAGIC or flags != _META_PAGE or number != at:
        raise Unreadable(f"page {at} is not a meta page of LMDB")
    if version != VERSION:
        raise UnknownVersion(f"version {version} of the file format; this is version {VERSION}")
    meta = Meta(_TREE.unpack(free)[0], Tree(*_TREE.unpack(free)), Tree(*_TREE.unpack(main)), last_page, txn)
    if meta.page_size not in _PAGE_SIZES:
        raise Unreadable(f"meta page {at} tells of pages of {meta.page_size} bytes")
    if meta.free.flags & ~_OPENED_AS_FILE != _INTEGER_KEYS or last_page * meta.page_size >= _MAX_BYTES:
        raise Unreadable(f"meta page {at} tells of flags {meta.free.flags} and a last page {last_page}")
    for tree in (meta.free, meta.main):
        if tree.root != NO_PAGE and not _FIRST_PAGE <= tree.root <= last_page:
            raise Unreadable(f"meta page {at} has a root at page {tree.root} of {last_page}")
    return meta


class PageCheck:
    """Walks the trees of one state of a file, each page once, and finds what is wrong with their form.

    Whoever makes one sees to it that the pages of that state stay: the writer does not run, or a read transaction of
    that state is open.
    """

    def __init__(self, file: int, meta: Meta, max_pages: int | None = None) -> None:
        """`max_pages`: no more than so many are looked at."""
        self._file = file
        self._meta = meta
        self._size = os.fstat(file).st_size
        self._left = NO_PAGE if max_pages is None else max_pages
        self._used = bytearray(min(meta.last_page + 1, self._size // meta.page_size))
        self.tables: dict[bytes, Tree] = {}
        """By name, once `main` was walked."""
        self._claimed = 0

    @property
    def cut_short(self) -> bool:
        """Whether the file is shorter than it says. It may be, by pages that are free."""
        return self._size < (self._meta.last_page + 1) * self._meta.page_size

    def everything(self) -> Iterator[Finding]:
        """Every page."""
        yield from self.main()
        for name, tree in self.tables.items():
            yield from self.table(name, tree)
        yield from self.free()
        if self._claimed != self._meta.last_page + 1 - _FIRST_PAGE:
            yield Finding("the file", f"{self._claimed} pages are in use or free, of {self._meta.last_page - 1}")

    def main(self) -> Iterator[Finding]:
        """The tree that names the tables."""
        tree = self._meta.main
        if tree.flags:
            yield Finding("the tree of tables", f"has flags {tree.flags}")
            return
        yield from self._walk("the tree of tables", tree, self._note_table)

    def _note_table(self, key: bytes, flags: int, data: bytes) -> str | None:
        if flags & _TABLE:
            if flags != _TABLE or len(data) != _TREE.size:
                return f"the table {key!r} is not described by {len(data)} bytes"
            self.tables[key] = Tree(*_TREE.unpack(data))
        return None

    def table(self, name: bytes, tree: Tree) -> Iterator[Finding]:
        """The tree of one table."""
        where = f"table {name.decode(errors='replace')}"
        if tree.flags:
            yield Finding(where, f"has flags {tree.flags}")
            return
        yield from self._walk(where, tree, None)

    def free(self) -> Iterator[Finding]:
        """The list of free pages."""
        yield from self._walk("the list of free pages", self._meta.free, self._note_free, integer_keys=True)

    def _note_free(self, key: bytes, flags: int, data: bytes) -> str | None:
        transaction = int.from_bytes(key, "little")
        if not 0 < transaction <= self._meta.txn or flags or len(data) % 8 or not data:
            return f"has no list of pages of transaction {transaction}"
        count, *pages = unpack_from(f"<{len(data) // 8}Q", data)
        if count > len(pages):
            return f"lists {count} pages of transaction {transaction}, in {len(data)} bytes"
        above = self._meta.last_page + 1
        used = self._used
        for page in pages[:count]:
            if not _FIRST_PAGE <= page < above:
                return f"lists page {page} as freed by transaction {transaction}"
            above = page
            self._claimed += 1
            if page < len(used):
                if used[page]:
                    return f"lists page {page}, which is in use or listed twice"
                used[page] = 1
        return None

    def root(self, tree: Tree) -> Iterator[Finding]:
        """The root page of a tree alone."""
        if tree.root == NO_PAGE:
            return
        try:
            raw, flags = self._page(tree.root)
            self._nodes(raw, flags, _by_bytes, b"", None)
        except Unreadable as error:
            yield Finding(f"page {tree.root}", str(error))

    def _walk(self, where: str, tree: Tree, note: Note | None, *, integer_keys: bool = False) -> Iterator[Finding]:
        order = _by_number if integer_keys else _by_bytes
        counted = [0, 0, 0, 0]
        sound = True
        stack: list[tuple[int, int, Rank, Rank]] = []
        if tree.root != NO_PAGE:
            stack.append((tree.root, 1, order(b""), None))
        while stack and self._left > 0:
            number, depth, low, high = stack.pop()
            try:
                raw, flags = self._page(number)
                keys, nodes = self._nodes(raw, flags, order, low, high)
                if (flags == _LEAF) != (depth == tree.depth) or depth > _MAX_DEPTH:
                    raise Unreadable(f"is at depth {depth} of {tree.depth}")
                if flags == _BRANCH:
                    counted[0] += 1
                    bounds = [low, *map(order, keys[1:]), high]
                    stack += [(node[0], depth + 1, *between) for node, *between in zip(nodes, bounds, bounds[1:])]
                else:
                    counted[1] += 1
                    counted[2] += self._leaf(raw, keys, nodes, note)
                    counted[3] += len(keys)
            except Unreadable as error:
                sound = False
                yield Finding(f"page {number}", f"{where}: {error}")
        if sound and not stack and tuple(counted) != tree[3:7]:
            yield Finding(where, f"branch, leaf and overflow pages and entries are {counted}, said to be {tree[3:7]}")

    def _leaf(self, raw: bytes, keys: list[bytes], nodes: list[tuple[int, int, int]], note: Note | None) -> int:
        """Hand the data of a leaf to `note`. Returns the number of overflow pages."""
        overflow = 0
        for key, (size, flags, at) in zip(keys, nodes):
            if flags & _BIG:
                overflow += self._overflow(_PAGE.unpack_from(raw, at)[0], size)
            if note is not None:
                if problem := note(key, flags & ~_BIG, self._data(raw, size, flags, at)):
                    raise Unreadable(problem)
            elif flags & ~_BIG:
                raise Unreadable(f"has a node with flags {flags}")
        return overflow

    def _claim(self, number: int, pages: int = 1) -> None:
        end = number + pages
        if not _FIRST_PAGE <= number < end <= self._meta.last_page + 1:
            raise Unreadable(f"is outside of the file's {self._meta.last_page + 1} pages")
        if end > len(self._used):
            raise Unreadable(f"is beyond the end of the file, which was cut to {self._size} bytes")
        if any(self._used[number:end]):
            raise Unreadable("is used twice")
        self._used[number:end] = b"\x01" * pages
        self._left -= pages
        self._claimed += pages

    def _page(self, number: int) -> tuple[bytes, int]:
        """A page of a tree, and whether it is a branch or a leaf."""
        self._claim(number)
        raw = os.pread(self._file, self._meta.page_size, number * self._meta.page_size)
        if len(raw) < self._meta.page_size:
            raise Unreadable("cannot be read to its end")
        own, _, flags, _, _ = _HEADER.unpack_from(raw)
        if own != number or flags not in (_BRANCH, _LEAF):
            raise Unreadable(f"is page {own} with flags {flags}, not a page of a tree")
        return raw, flags

    def _nodes(
        self, raw: bytes, flags: int, order: Order, low: Rank, high: Rank
    ) -> tuple[list[bytes], list[tuple[int, int, int]]]:
        """Keys, and of each node of a leaf (data size, flags, where its data is), of a branch (page below, 0, 0)."""
        _, _, _, lower, upper = _HEADER.unpack_from(raw)
        page_size = len(raw)
        count = (lower - _HEADER_SIZE) // 2
        if lower < _HEADER_SIZE or lower & 1 or not lower <= upper <= page_size or count < 1:
            raise Unreadable(f"has its free space at {lower} to {upper}")
        keys: list[bytes] = []
        nodes: list[tuple[int, int, int]] = []
        filled = 0
        unpack = _NODE.unpack_from
        for at in unpack_from(f"<{count}H", raw, _HEADER_SIZE):
            if at < upper or at + _NODE_SIZE > page_size:
                raise Unreadable(f"has a node at {at}")
            size, high_part, node_flags, key_size = unpack(raw, at)
            data_at = at + _NODE_SIZE + key_size
            if flags == _LEAF:
                size |= high_part << 16
                end = data_at + (8 if node_flags & _BIG else size)
                nodes.append((size, node_flags, data_at))
            else:
                end = data_at
                nodes.append((size | high_part << 16 | node_flags << 32, 0, 0))
            if end > page_size or key_size > _MAX_KEY:
                raise Unreadable(f"has a node at {at} that ends at {end}")
            filled += end - at + (end - at & 1)
            keys.append(raw[at + _NODE_SIZE : data_at])
        if filled != page_size - upper:
            raise Unreadable(f"has nodes of {filled} bytes in {page_size - upper}")
        _check_order(keys if flags == _LEAF else keys[1:], order, low, high)
        return keys, nodes

    def _overflow(self, number: int, size: int) -> int:
        """Claim the pages of data that lies outside of its leaf. Returns how many."""
        pages = (_HEADER_SIZE - 1 + size) // self._meta.page_size + 1
        self._claim(number, pages)
        head = os.pread(self._file, _HEADER_SIZE, number * self._meta.page_size)
        own, _, flags, low, high = _HEADER.unpack(head)
        if own != number or flags != _OVERFLOW or low | high << 16 != pages:
            raise Unreadable(f"has data at page {number}, which is not {pages} overflow pages")
        return pages

    def _data(self, raw: bytes, size: int, flags: int, at: int) -> bytes:
        if not flags & _BIG:
            return raw[at : at + size]
        (number,) = _PAGE.unpack_from(raw, at)
        return os.pread(self._file, size, number * self._meta.page_size + _HEADER_SIZE)


def _check_order(keys: list[bytes], order: Order, low: Rank, high: Rank) -> None:
    if order is _by_number and not all(len(key) == 8 for key in keys):
        raise Unreadable("has a key that is no number")
    ranks = list(map(order, keys))
    if not all(map(lt, ranks, ranks[1:])):
        raise Unreadable("has keys out of order")
    if ranks and (ranks[0] < low or (high is not None and ranks[-1] >= high)):
        raise Unreadable("has keys that belong elsewhere")


def _by_bytes(key: bytes) -> bytes:
    return key


def _by_number(key: bytes) -> int:
    return int.from_bytes(key, "little")
