"""SGLang's own radix cache, from its published wheel and without a GPU: after every step the index must be its tree.

    .venv/bin/python tests/drills/sglang_tree.py --wheel sglang-0.5.23-….whl --seeds 200 --page-size 1,16

Random requests with shared prefixes are stored, matched, locked, evicted and flushed, with and without EAGLE's pairs of
tokens. The events of each step go, encoded as the engine's publisher does it, through the translator into an index,
which must then have the tree's pages, hashed anew from their tokens, and must match random prompts as far as the tree.

The tree is the one that a plain launch of that release builds: `RadixCache`, in newer ones `UnifiedRadixCache` with its
Python core. Needs torch (1.13 for the CPU is enough), and of the wheel nothing but the modules in REAL: what else these
import is replaced by empty shells, or by what is in GIVEN. That is the page hash, which newer releases have in C++, as
`page_hashes`, the Python of older ones. Not driven: the hierarchical cache, whose tiers are pools and copies on a GPU;
sliding windows and Mamba, likewise; the core in Rust, which newer releases prefer and which needs a newer torch.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import inspect
import json
import os
import random
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any
from zipfile import ZipFile

import msgspec

from kvcensus.backends.memory import MemoryBackend
from kvcensus.translators.sglang import SglangTranslator
from kvcensus.translators.translation import TranslatorOptions

CACHE = "sglang.srt.mem_cache"
EVENTS = "sglang.srt.disaggregation.kv_events"
OF_THE_CACHE = "radix_cache base_prefix_cache cache_init_params events utils evict_policy hicache_storage"
UNIFIED = f"{CACHE}.unified_cache"
OF_THE_UNIFIED = (
    "cache_action component_type components components.base components.full components.mamba components.swa "
    "components.tree_component components.full_component components.mamba_component components.swa_component "
    "session_ref_tracker tree_core_registry unified_tree_core unified_tree_core_interface"
)
REAL = {
    EVENTS,
    UNIFIED,
    "sglang.srt.environ",
    f"{CACHE}.unified_radix_cache",
    *(f"{CACHE}.{name}" for name in OF_THE_CACHE.split()),
    *(f"{UNIFIED}.{name}" for name in OF_THE_UNIFIED.split()),
}
PACKAGES = {"sglang", "sglang.srt", CACHE, "sglang.srt.disaggregation"}
POLICIES = ("lru", "lfu", "fifo", "mru", "filo", "priority")
VOCABULARY = 3
PROMPT_PAGES = 12
SALT_TAG = b"sglang-cache-salt-v1\0"
Token = int | tuple[int, int]


class Difference(Exception):
    """The index is not the tree."""


def page_hashes(tokens: Iterable[Token], page_size: int, seed: bytes = b"") -> list[bytes]:
    """The SHA-256 of each full page: of the digest before it, then of its tokens as 4 bytes each, little-endian."""
    units = list(tokens)
    digests: list[bytes] = []
    for start in range(0, len(units) - page_size + 1, page_size):
        numbers = [
            n for unit in units[start : start + page_size] for n in (unit if isinstance(unit, tuple) else (unit,))
        ]
        seed = hashlib.sha256(seed + b"".join(n.to_bytes(4, "little") for n in numbers)).digest()
        digests.append(seed)
    return digests


def native_hash(tokens: Iterable[Token], prior: bytes | None, page_size: int) -> list[str]:
    """What the engine's C++ gives its tree."""
    return [digest.hex() for digest in page_hashes(tokens, page_size, prior or b"")]


class _Shell(type):
    """A class of which every attribute is another one, and which takes any arguments."""

    def __new__(cls, name: str, *_: object) -> _Shell:
        body = {
            "__init__": lambda *_, **__: None,
            "__call__": lambda self, given=None, *_, **__: given,  # a decorator that decorates nothing
            "__bool__": lambda self: False,
        }
        return super().__new__(cls, name, (), body)

    def __getattr__(cls, name: str) -> _Shell:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Shell(name)


class NoSessions:
    """No request belongs to a streaming session."""

    def __init__(self, *_: object, **__: object) -> None:
        self.slots: dict[str, object] = {}

    def nothing(self, *_: object, **__: object) -> None: ...

    try_match_prefix = try_inc_lock_ref = try_dec_lock_ref = nothing


GIVEN: dict[str, dict[str, object]] = {
    f"{CACHE}.cpp_utils.native_hash": {"get_native_hash": native_hash},
    f"{CACHE}.allocator.page_interleave": {"page_interleave_shard_size": lambda _: 1},
    "sglang.srt.session.streaming_session": {"StreamingSession": NoSessions},
}


class Shells:
    """Import hook: packages without their code, and a shell for each module that is not in REAL or not installed."""

    def __init__(self, wheel: Path) -> None:
        self._wheel = wheel

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name in REAL:
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = ModuleType(spec.name)
        module.__path__ = [f"{self._wheel}/{spec.name.replace('.', '/')}"] if spec.name in PACKAGES else []
        if spec.name not in PACKAGES:
            module.__getattr__ = lambda name: getattr(_Shell(spec.name), name)  # type: ignore[method-assign]
        vars(module).update(GIVEN.get(spec.name, {}))
        return module

    def exec_module(self, module: ModuleType) -> None:
        pass


class OnlySglang(Shells):
    """Goes before the importers of Python: SGLang's modules only."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return super().find_spec(name) if name.partition(".")[0] == "sglang" else None


class Engine:
    """The modules of one wheel."""

    def __init__(self, wheel: Path) -> None:
        os.environ["SGLANG_UNIFIED_RADIX_TREE_CORE_BACKEND"] = "python"
        self.torch: Any = importlib.import_module("torch")
        with ZipFile(wheel) as archive:
            self.unified = f"{UNIFIED}.tree_core_registry".replace(".", "/") + ".py" in archive.namelist()
        first, last = OnlySglang(wheel), Shells(wheel)
        sys.meta_path.insert(0, first)
        sys.meta_path.append(last)
        try:
            self.cache: Any = importlib.import_module(f"{CACHE}.radix_cache")
            self.base: Any = importlib.import_module(f"{CACHE}.base_prefix_cache")
            self.params: Any = importlib.import_module(f"{CACHE}.cache_init_params")
            self.events: Any = importlib.import_module(EVENTS)
            if self.unified:
                self.tree: Any = importlib.import_module(f"{CACHE}.unified_radix_cache").UnifiedRadixCache
                full = importlib.import_module(f"{UNIFIED}.component_type").ComponentType.FULL
                self.kind: dict[str, Any] = {"tree_components": (full,)}
        finally:
            sys.meta_path.remove(first)
            sys.meta_path.remove(last)
        if not self.unified:
            self.tree, self.kind = self.cache.RadixCache, {}
        known = inspect.signature(self.params.CacheInitParams).parameters
        self.kind = {name: value for name, value in self.kind.items() if name in known}
        self.salts = "cache_salt" in inspect.signature(self.cache.RadixKey).parameters
        self.aligns = hasattr(self.cache.RadixKey, "page_aligned")
        self.arrays = "array(" in inspect.getsource(self.cache.RadixCache.reset)

    def key(self, tokens: list[int], salt: str | None) -> Any:
        return self.cache.RadixKey(
            array("q", tokens) if self.arrays else tokens, **({"cache_salt": salt} if salt else {})
        )

    def call(self, method: Any, params: str, **arguments: Any) -> Any:
        """A method of the tree, whose arguments are a structure since 0.5.9."""
        made = getattr(self.base, params, None)
        return method(made(**arguments)) if made else method(*arguments.values())


class Allocator:
    """Of the pool of KV memory the tree only needs that it takes back what was evicted."""

    device = "cpu"

    def free(self, _: object) -> None: ...

    def free_segment(self, _: object, start_pos: int = 0) -> None: ...


class Run:
    """One tree and the index that follows it."""

    def __init__(self, engine: Engine, seed: int, page_size: int, eagle: bool) -> None:
        self.engine, self.page_size, self.eagle = engine, page_size, eagle
        self.random = random.Random(seed)
        self.tree: Any = engine.tree(
            engine.params.CacheInitParams(
                disable=False,
                req_to_token_pool=None,
                token_to_kv_pool_allocator=Allocator(),
                page_size=page_size,
                is_eagle=eagle,
                eviction_policy=self.random.choice(POLICIES),
                enable_kv_cache_events=True,
                **engine.kind,
            )
        )
        self.encode = msgspec.msgpack.Encoder().encode
        self.translator = SglangTranslator(TranslatorOptions("engine", "model"))
        self.facts = 0
        self.index = MemoryBackend()
        self.prompts: list[tuple[list[int], str | None]] = []
        self.locked: list[Any] = []
        self.counts = dict.fromkeys(("steps", "stores", "removals", "clears", "pages", "matches", "found"), 0)

    def prompt(self) -> tuple[list[int], str | None]:
        """Another ending of an earlier prompt, or a new one."""
        salt = self.random.choice((None, None, "a", "b")) if self.engine.salts else None
        tokens: list[int] = []
        if self.prompts and self.random.random() < 0.8:
            earlier, salt = self.random.choice(self.prompts)
            tokens = earlier[: self.random.randint(0, len(earlier))]
        most = PROMPT_PAGES * self.page_size
        wanted = self.random.randint(1, most * 2)
        tokens = tokens + [self.random.randrange(VOCABULARY) for _ in range(wanted - len(tokens))]
        if not self.engine.aligns:
            tokens = tokens[: (len(tokens) - self.eagle) // self.page_size * self.page_size + self.eagle]
        return tokens, salt

    def step(self) -> None:
        kind = self.random.choices(("insert", "lock", "unlock", "evict", "reset"), (60, 8, 8, 22, 1))[0]
        if kind == "insert":
            tokens, salt = self.prompt()
            if len(tokens) > self.eagle:
                self.prompts.append((tokens, salt))
                slots = self.engine.torch.arange(len(tokens))
                self.engine.call(self.tree.insert, "InsertParams", key=self.engine.key(tokens, salt), value=slots)
        elif kind == "lock" and self.prompts:
            node = self.matched(*self.random.choice(self.prompts)).last_device_node
            lock = self.tree.inc_lock_ref(node)
            self.locked.append((node, lock.to_dec_params()) if hasattr(lock, "to_dec_params") else (node,))
        elif kind == "unlock" and self.locked:
            self.tree.dec_lock_ref(*self.locked.pop(self.random.randrange(len(self.locked))))
        elif kind == "evict":
            size = self.random.randint(1, PROMPT_PAGES * self.page_size * 4)
            self.engine.call(self.tree.evict, "EvictParams", num_tokens=size)
        elif kind == "reset":
            self.tree.reset()
            self.locked.clear()
        self.counts["steps"] += 1

    def matched(self, tokens: list[int], salt: str | None) -> Any:
        return self.engine.call(self.tree.match_prefix, "MatchPrefixParams", key=self.engine.key(tokens, salt))

    def publish(self) -> None:
        """What the scheduler does after a step, and what the daemon does with it."""
        events = self.tree.take_events()
        if not events:
            return
        payload = self.encode(self.engine.events.KVEventBatch(ts=time.time(), events=events))
        translation = self.translator.translate(payload, self.facts)
        self.facts = translation.facts
        applied = self.index.apply(translation.operations)
        if translation.rejections or applied.unknown_removals:
            raise Difference(f"{translation.rejections} {applied.unknown_removals} unknown removals")
        self.counts["stores"] += translation.stored_events
        self.counts["removals"] += translation.removed_events
        self.counts["clears"] += translation.cleared_events

    def check(self) -> None:
        """Page for page, and then what a few prompts would find."""
        root = self.tree.tree_core.root_node if self.engine.unified else self.tree.root_node
        held = [one.key.block_hash for one in self.index.snapshot()]
        pages = [digest[:8] for digest in self.pages(root, b"")]
        if sorted(held) != sorted(pages):
            missing, invented = set(pages) - set(held), set(held) - set(pages)
            raise Difference(f"of {len(pages)} pages {len(missing)} are missing; {len(invented)} are not in the tree")
        self.counts["pages"] += len(pages)
        for _ in range(3):
            tokens, salt = self.prompt()
            if len(tokens) <= self.eagle:
                continue
            found = self.matched(tokens, salt)
            length = getattr(found, "device_prefix_len", None)
            expected = (len(found.device_indices) if length is None else length) // self.page_size
            units: Sequence[Token] = list(pairwise(tokens)) if self.eagle else tokens
            hashes = [digest[:8] for digest in page_hashes(units, self.page_size, seed_of(salt))]
            matches = self.index.match(None, hashes)
            blocks = matches[0].blocks if matches else 0
            if blocks != expected:
                raise Difference(f"a prompt matches {blocks} pages in the index, {expected} in the tree")
            self.counts["matches"] += 1
            self.counts["found"] += blocks > 0

    def pages(self, node: Any, before: bytes) -> Iterator[bytes]:
        """The hash of every page below a node, made of its tokens."""
        for child in node.children.values():
            seed = before or seed_of(getattr(child.key, "cache_salt", None))
            digests = page_hashes(child.key, self.page_size, seed)
            yield from digests
            yield from self.pages(child, digests[-1])


def seed_of(salt: str | None) -> bytes:
    return hashlib.sha256(SALT_TAG + salt.encode()).digest() if salt else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--torch", help="a directory to look for torch in, after all others")
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--first-seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--page-size", default="1,16")
    arguments = parser.parse_args()
    if arguments.torch:
        sys.path.append(arguments.torch)
    engine = Engine(arguments.wheel.resolve())
    began = time.monotonic()
    total: dict[str, int] = {}
    for page_size in map(int, arguments.page_size.split(",")):
        for eagle in (False, True):
            for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
                run = Run(engine, seed, page_size, eagle)
                for step in range(arguments.steps):
                    try:
                        run.step()
                        run.publish()
                        run.check()
                    except Difference as difference:
                        sys.exit(f"seed {seed}, step {step}, page size {page_size}, EAGLE {eagle}: {difference}")
                total = {name: total.get(name, 0) + count for name, count in run.counts.items()}
    report = {"wheel": arguments.wheel.name, "tree": engine.tree.__name__, **total, "seconds": time.monotonic() - began}
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
