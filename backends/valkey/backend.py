"""The Valkey backend: one transaction a call, made by one thread; reads are left to `ValkeyReader`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import msgspec

from valkey.connection import Connection

from ..errors import BackendCorrupt, BackendError, BackendUnavailable
from ..interface import IndexBackend
from ..lmdb.batch import Batch
from ..lmdb.catalog import WriterCatalog
from ..lmdb.checks import UNDECODABLE
from ..model import (
    ApplyResult,
    CacheResidency,
    ClearBlocks,
    Cursor,
    Holding,
    IdentityScope,
    IndexMetrics,
    Operation,
    StoreHealth,
    WorkerMatch,
)
from ..ownership import Owner
from .layout import TABLES, Command, Keys, parts_key
from .reader import Frozen, ValkeyReader
from .server import Disconnected, Moved, Server, ValkeyOptions
from .session import Lease, begin
from .sweep import Sweep
from .transaction import Committed, Overtaken, Position, ServerOverlay, Transaction, Uncertain

T = TypeVar("T")

_TRIES = 3
"""Attempts at one call, beside one for each server: an idle connection that went, a move in a cluster, a lost reply."""

_RECLAIM, _RENEW = "reclaim", "renew"
_TIDYING = (_RECLAIM, _RENEW)
"""Calls that change nothing that anybody asks about."""

_encode = msgspec.msgpack.encode


class _Attempt(NamedTuple):
    """A commit whose outcome is not known: what was called, and what it came to if it was carried out."""

    call: object
    outcome: Any
    result: ApplyResult
    totals: tuple[int, int]
    adds_dead: bool


class ValkeyBackend(IndexBackend):
    """One part of an index on a server, which this process owns until `close`. It answers for this part alone."""

    reads_wait = True

    def __init__(self, directory: Path, options: ValkeyOptions | None = None) -> None:
        """Open or create. `directory` has nothing but who we are. Raises BackendBusy, BackendFormat or BackendError."""
        options = options or ValkeyOptions()
        self._keys = Keys(options.namespace, options.part)
        self._lock = threading.RLock()
        self._connection: Connection | None = None
        self._catalog: WriterCatalog | None = None
        self._uncertain: dict[int, _Attempt] = {}
        self._attempts = 0
        self._untold: _Attempt | None = None
        """One that was carried out after all, while its caller asked for something else."""
        self._snapshots: list[Frozen] = []
        self._puts = self._removes = self._bytes_written = 0
        self._damage: BackendCorrupt | None = None
        self._health = StoreHealth()
        self._tries = _TRIES + len(options.servers)
        self._owner = Owner(directory)
        self._server = Server(options)
        try:
            self._lease = Lease(directory, self._keys, options.lease_ms)
            self._position = self._begin()
            self._reader = ValkeyReader(self._server, self._keys)
            self._sweep = Sweep(self._keys)
            self._totals = self._write("open", lambda txn, batch: None, commits=False) or self._catalog_totals()
            self._sweep.has_dead = self._ask_dead()
            self._refuse_eviction()
            names = Server(options)
            names.ask([("SADD", parts_key(options.namespace), options.part)])
            names.close()
        except BaseException:
            self._disconnect()
            self._owner.release()
            raise

    def _begin(self) -> Position:
        problem: BaseException | None = None
        for _ in range(self._tries):
            try:
                return begin(self._server, self._connected(), self._keys, self._lease)
            except (BackendUnavailable, Overtaken) as error:
                problem = error
                self._disconnect()
            except BaseException:
                self._disconnect()
                raise
        raise BackendUnavailable(str(problem)) from problem

    def _refuse_eviction(self) -> None:
        """A server that drops keys when it is full would drop some of the index, and nobody would know."""
        memory = self._memory()
        policy = memory.get("maxmemory_policy", "noeviction")
        if int(memory.get("maxmemory", 0)) and policy.startswith("allkeys"):
            raise BackendError(
                f"valkey {self._server.address}: maxmemory-policy is {policy}: a full server drops parts of the index "
                "unseen. Set it to noeviction"
            )

    def _memory(self) -> dict[str, str]:
        lines = self._server.ask([("INFO", "memory")])[0].decode(errors="replace").splitlines()
        return dict(line.split(":", 1) for line in lines if ":" in line)

    def _connected(self) -> Connection:
        if self._connection is None:
            self._connection = self._server.connect()
        return self._connection

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _catalog_totals(self) -> tuple[int, int]:
        assert self._catalog is not None
        return self._catalog.totals()

    def _ask_dead(self) -> bool:
        return bool(self._server.ask([("HLEN", self._keys.tables["dead"])])[0])

    def name(self) -> str:
        return "valkey"

    def persistent(self) -> bool:
        return True

    def _write(self, call: object, change: Callable[[Transaction, Batch], T], *, commits: bool = True) -> T:
        """Make one change in one transaction. The same `call` again finds out whether the last one was carried out.

        After an error nothing of it is kept, but for BackendUnavailable: then it may be, and the next call will know.
        A change that finds that another one was carried out, whose caller was told of an error, is not made: it was
        asked for by somebody who knows no better.
        """
        problem: BaseException | None = None
        with self._lock:
            if self._untold is not None and self._untold.call == call:
                done, self._untold = self._untold, None
                return cast("T", done.outcome)
            for _ in range(self._tries):
                try:
                    return self._attempt(call, change, commits)
                except Committed as known:
                    done = self._settle(known.attempt)
                    if done.call == call:
                        return cast("T", done.outcome)
                    self._untold = done
                    if call not in _TIDYING:
                        raise BackendUnavailable(
                            "the call before this one was carried out after all: ask for it again"
                        ) from None
                except (Moved, Overtaken, Uncertain, Disconnected) as error:
                    problem = error
        raise BackendUnavailable(str(problem)) from problem

    def _attempt(self, call: object, change: Callable[[Transaction, Batch], T], commits: bool) -> T:
        position = self._position._replace(attempts=tuple(self._uncertain))
        try:
            txn = Transaction(self._server, self._connected(), self._keys, position)
            if self._catalog is None:
                self._catalog = WriterCatalog(cast("Any", txn), TABLES)
                self._totals = self._catalog.totals()
            overlay = ServerOverlay(txn, self._keys)
            batch = Batch(cast("Any", txn), TABLES, self._catalog, overlay)
            outcome = change(txn, batch)
            batch.finish()
            if not commits:
                txn.ask(())
                return outcome
            for frozen in self._snapshots:
                for key in overlay.changed:
                    frozen.keep(key, overlay.before(key))
            adds_dead = txn.adds_to("dead")
            self._commit(txn, _Attempt(call, outcome, batch.result, self._catalog.totals(), adds_dead))
        except BaseException as error:
            self._catalog = None
            self._sweep.restart()
            self._disconnect()
            if isinstance(error, UNDECODABLE):
                error = BackendCorrupt(f"valkey {self._server.address}: the index is damaged ({error!r})")
            if isinstance(error, BackendCorrupt):
                self._damage = error
            raise error
        self._settle(self._attempts)
        if call not in _TIDYING:
            self._untold = None
        self._bytes_written += batch.bytes_written + txn.bytes_written
        return outcome

    def _commit(self, txn: Transaction, attempt: _Attempt) -> None:
        self._attempts += 1
        renews = self._lease.is_due
        self._uncertain[self._attempts] = attempt
        try:
            txn.commit(self._attempts, [self._lease.renewal()] if renews else [])
        except Uncertain:
            raise
        except BaseException:
            del self._uncertain[self._attempts]
            raise
        if renews:
            self._lease.renewed()

    def _settle(self, attempt: int) -> _Attempt:
        """An attempt was carried out, and so no other one at the same commit can be any more. Returns it."""
        done = self._uncertain[attempt]
        self._position = self._position._replace(commit=self._position.commit + 1, attempt=attempt)
        self._uncertain.clear()
        self._totals = done.totals
        self._sweep.has_dead = self._sweep.has_dead or done.adds_dead
        self._puts += done.result.stored + done.result.copies_added + done.result.refreshed
        self._removes += done.result.copies_removed
        return done

    def apply(self, operations: Sequence[Operation], cursors: Sequence[Cursor] = ()) -> ApplyResult:
        def change(txn: Transaction, batch: Batch) -> ApplyResult:
            batch.run(operations)
            for cursor in cursors:
                txn.put(cursor.stream.encode(), _encode(cursor), db="streams")
            return batch.result

        return self._write((tuple(operations), tuple(cursors)), change)

    def forget_stream(self, stream: str) -> None:
        self._write(("forget", stream), lambda txn, batch: txn.delete(stream.encode(), db="streams"))

    def put(self, residency: CacheResidency) -> None:
        self._write(("put", residency), lambda txn, batch: batch.put(residency))
        self._puts += 1

    def put_all(self, residencies: Sequence[CacheResidency]) -> None:
        many = tuple(residencies)
        self._write(("put", many), lambda txn, batch: batch.put_all(many))
        self._puts += len(many)

    def remove_block(self, scope: IdentityScope, worker_id: str, block_hash: bytes) -> int:
        removed = self._write(
            ("remove", scope, worker_id, block_hash),
            lambda txn, batch: batch.remove_scoped(scope, worker_id, block_hash),
        )
        self._removes += removed
        return removed

    def clear_worker(self, worker_id: str) -> int:
        return self.apply([ClearBlocks(worker_id)]).cleared

    def clear(self) -> None:
        def change(txn: Transaction, batch: Batch) -> None:
            assert self._catalog is not None
            for worker_id in self._catalog.workers():
                batch.clear(ClearBlocks(worker_id))

        self._write("clear", change)

    def reclaim(self, rows: int) -> bool:
        if not self._sweep.has_dead:
            if self._lease.is_due:
                self._renew()
            return False

        def change(txn: Transaction, batch: Batch) -> bool:
            assert self._catalog is not None
            empty = not self._catalog.rows and not self._snapshots
            return self._sweep.step(txn, batch, rows, empty=empty)

        self._sweep.has_dead = self._write(_RECLAIM, change)
        return self._sweep.has_dead

    def _renew(self) -> None:
        """Say that we are still here, and find out whether the index still is what it was."""

        def change(txn: Transaction, batch: Batch) -> None:
            txn.ask(())

        self._write(_RENEW, change)

    def cursors(self) -> dict[str, Cursor]:
        return self._reader.cursors()

    def find(self, block_hash: bytes, scope: IdentityScope | None = None) -> list[CacheResidency]:
        return self._reader.find(block_hash, scope)

    def prefix_scan(self, scope: IdentityScope, prefix_hash: bytes) -> list[CacheResidency]:
        return self._reader.prefix_scan(scope, prefix_hash, lambda: self._lock)

    def match(self, scope: IdentityScope | None, block_hashes: Sequence[bytes]) -> list[WorkerMatch]:
        return self._reader.match(scope, block_hashes)

    def holdings(self) -> list[Holding]:
        return self._reader.holdings()

    def snapshot(self) -> Iterator[CacheResidency]:
        """What changes while it is read is kept in memory as it was, until it has been read."""
        frozen = Frozen()
        with self._lock:
            if self._uncertain:
                self._renew()
            places = self._reader.places()
            self._snapshots.append(frozen)
        try:
            yield from self._reader.records(places, frozen, len(self))
        finally:
            with self._lock:
                self._snapshots.remove(frozen)

    def __len__(self) -> int:
        return self._totals[0]

    def metrics(self) -> IndexMetrics:
        records, size = self._totals
        return IndexMetrics(records, size, self._puts, self._removes, self._reader.prefix_scans, self._bytes_written)

    def stored_bytes(self) -> int:
        """The server's estimate of its memory for the index, from a sample of each key."""
        keys = (*self._keys.buckets, self._keys.links, *self._keys.tables.values())
        return sum(size or 0 for size in self._server.ask([("MEMORY", "USAGE", key) for key in keys]))

    def health(self) -> StoreHealth:
        """Of the whole server's memory, whoever uses it; the last known when it cannot be reached."""
        with suppress(BackendError):
            memory = self._memory()
            self._health = StoreHealth(int(memory.get("used_memory", 0)), int(memory.get("maxmemory", 0)))
        return self._health

    def damage(self) -> BackendCorrupt | None:
        return self._damage or self._reader.damage

    def close(self) -> None:
        try:
            with suppress(BackendError):
                give_up: list[Command] = [("DEL", self._keys.lease)]
                self._write("close", lambda txn, batch: txn.commands.extend(give_up))
            self._disconnect()
            self._server.close()
        finally:
            self._owner.release()


def open_valkey(directory: Path, options: Mapping[str, Any]) -> ValkeyBackend:
    """For the registry. `options` are those of ValkeyOptions. Raises BackendError."""
    try:
        chosen = msgspec.convert(dict(options), ValkeyOptions)
    except msgspec.ValidationError as error:
        raise BackendError(f"valkey: {error}") from error
    return ValkeyBackend(directory, chosen)
