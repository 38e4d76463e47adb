"""What the server may do to the index: go away, answer late or never, lose what it had, move it, refuse us."""

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("valkey")

from kvcensus.backends.errors import (
    BackendBusy,
    BackendError,
    BackendFormat,
    BackendFull,
    BackendLost,
    BackendUnavailable,
)
from kvcensus.backends.model import ApplyResult, Cursor, IdentityScope
from kvcensus.backends.valkey.backend import ValkeyBackend, open_valkey
from kvcensus.backends.valkey.layout import Keys
from kvcensus.backends.valkey.reader import ValkeyReader
from kvcensus.backends.valkey.server import Disconnected, Server, ValkeyOptions
from kvcensus.backends.valkey.shared import SharedReader
from tests.valkey_servers import ValkeyServer, needs_server, running_cluster, running_server

from .building import LORA, SCOPE, block, blocks, clear, store

pytestmark = needs_server

A, B, C = blocks(1, 2, 3)
DURABLE = {"appendonly": "yes", "appendfsync": "always"}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    with running_server(tmp_path / "server", DURABLE) as running:
        yield running


def opened(server: ValkeyServer, directory: Path, **options: Any) -> ValkeyBackend:
    return open_valkey(directory, {"servers": [server.address], "timeout_ms": 500, **options})


def at(number: int) -> list[Cursor]:
    return [Cursor("s", 1, number)]


def apply_until_unavailable(backend: ValkeyBackend, number: int) -> int:
    """The number of the last batch that was acknowledged."""
    while True:
        try:
            backend.apply([store(block(number + 1))], at(number + 1))
        except BackendUnavailable:
            return number
        number += 1


# going away


def test_a_killed_server_is_waited_for_and_nothing_acknowledged_is_lost(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(A)], at(1))

    server.kill()
    with pytest.raises(BackendUnavailable):
        backend.apply([store(B)], at(2))
    with pytest.raises(BackendUnavailable):
        backend.find(A)
    server.start()

    assert backend.apply([store(B)], at(2)) == ApplyResult(stored=1)
    assert backend.cursors()["s"].seq == 2
    assert len(backend) == 2
    backend.close()


def test_a_commit_whose_answer_was_lost_is_not_made_twice(
    server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(server, tmp_path / "index")
    batch = [store(A), store(A)]
    exchange = Server.exchange
    losses = [2]

    def loses_answers(self: Server, connection: Any, commands: Any) -> Any:
        replies = exchange(self, connection, commands)
        if losses[0] and commands[-1] == ("EXEC",):
            losses[0] -= 1
            connection.disconnect()
            raise Disconnected("lost")
        return replies

    monkeypatch.setattr(Server, "exchange", loses_answers)

    assert backend.apply(batch, at(1)) == ApplyResult(stored=1, copies_added=1)
    assert backend.apply([store(B)], at(2)) == ApplyResult(stored=1)
    assert losses == [0]
    assert [one.ref_count for one in backend.find(A)] == [2]
    assert (backend.metrics().puts, len(backend)) == (3, 2)
    backend.close()


def test_a_commit_that_was_carried_out_unknown_to_its_caller_is_not_made_twice_whatever_is_asked_in_between(
    server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(server, tmp_path / "index")
    exchange = Server.exchange
    away = []

    def goes_away(self: Server, connection: Any, commands: Any) -> Any:
        if away:
            raise Disconnected("away")
        replies = exchange(self, connection, commands)
        if commands[-1] == ("EXEC",):
            away.append(True)
            raise Disconnected("lost")
        return replies

    with monkeypatch.context() as patched:
        patched.setattr(Server, "exchange", goes_away)
        with pytest.raises(BackendUnavailable):
            backend.apply([store(A)], at(1))
    with pytest.raises(BackendUnavailable, match="carried out after all"):
        backend.apply([clear()], at(0))
    backend.reclaim(100)

    assert backend.apply([store(A)], at(1)) == ApplyResult(stored=1)
    assert backend.apply([store(A)], at(2)) == ApplyResult(copies_added=1)
    assert [one.ref_count for one in backend.find(A)] == [2]
    assert backend.apply([clear()], at(3)).cleared == 1
    backend.close()


def test_a_server_that_answers_nothing_gets_each_batch_once(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index", timeout_ms=100)
    waker = threading.Timer(1.5, server.resume)
    server.pause()
    waker.start()
    waited = 0
    while True:
        try:
            result = backend.apply([store(A)], at(1))
            break
        except BackendUnavailable:
            waited += 1
    waker.join()

    assert waited
    assert result == ApplyResult(stored=1)
    assert [one.ref_count for one in backend.find(A)] == [1]
    backend.close()


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_kill_9_of_the_server_leaves_whole_commits_and_loses_none_with_always(fsync: str, tmp_path: Path) -> None:
    """With `everysec` the server holds writes back while it syncs, so its end costs what a machine's crash would."""
    with running_server(tmp_path / "server", {"appendonly": "yes", "appendfsync": fsync}) as server:
        backend = opened(server, tmp_path / "index")
        number = 0
        for _ in range(3):
            killer = threading.Timer(0.3, server.kill)
            killer.start()
            number = apply_until_unavailable(backend, number)
            killer.join()
            server.start()
            try:
                backend.apply([store(block(number + 1))], at(number + 1))
                number += 1
            except BackendLost:
                assert fsync == "everysec"
                backend.close()
                backend = opened(server, tmp_path / "index")
                assert backend.cursors()["s"].seq < number
                number = backend.cursors()["s"].seq
            assert backend.cursors()["s"].seq == number == len(list(backend.snapshot()))
        backend.close()


# losing what it had


def test_a_flush_is_noticed_by_the_next_commit_and_fences(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(A)], at(1))

    server.cli("FLUSHALL")

    for _ in range(2):
        with pytest.raises(BackendLost, match="emptied"):
            backend.apply([store(B)], at(2))
    backend.close()
    again = opened(server, tmp_path / "index")
    assert (again.cursors(), len(again)) == ({}, 0)
    again.close()


def test_an_older_state_is_noticed_and_its_cursors_fit_it(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(A)], at(1))
    files = tmp_path / "server" / "appendonlydir"
    old = {path: path.read_bytes() for path in files.iterdir()}
    backend.apply([store(B)], at(2))
    server.kill()
    for path, content in old.items():
        path.write_bytes(content)
    server.start()

    with pytest.raises(BackendLost, match="older state"):
        backend.apply([store(C)], at(3))
    backend.close()
    again = opened(server, tmp_path / "index")
    assert (again.cursors()["s"].seq, len(again), len(again.find(A)), again.find(B)) == (1, 1, 1, [])
    again.close()


def test_an_idle_writer_notices_too(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index", lease_ms=300)
    server.cli("FLUSHALL")
    time.sleep(0.15)

    with pytest.raises(BackendLost):
        backend.reclaim(1)
    backend.close()


# one writer


def test_a_second_process_is_refused_while_the_lease_lasts(server: ValkeyServer, tmp_path: Path) -> None:
    first = opened(server, tmp_path / "one")
    with pytest.raises(BackendBusy):
        opened(server, tmp_path / "one")
    with pytest.raises(BackendBusy, match="another directory"):
        opened(server, tmp_path / "two")
    other_part = opened(server, tmp_path / "two", part="other")
    other_part.close()
    first.close()

    opened(server, tmp_path / "two").close()


def test_a_writer_whose_lease_has_lapsed_cannot_write_once_another_has_begun(
    server: ValkeyServer, tmp_path: Path
) -> None:
    first = opened(server, tmp_path / "one", lease_ms=100)
    first.apply([store(A)], at(1))
    time.sleep(0.15)
    second = opened(server, tmp_path / "two")

    with pytest.raises(BackendBusy, match="taken the index over"):
        first.apply([store(B)], at(2))
    assert second.cursors()["s"].seq == 1
    assert len(second) == 1
    first.close()
    second.apply([store(C)], at(2))
    second.close()


def test_an_index_of_another_schema_is_left_alone(server: ValkeyServer, tmp_path: Path) -> None:
    opened(server, tmp_path / "index").close()
    server.cli("HSET", "{kvcensus/main}:meta", "schema", "99")

    with pytest.raises(BackendFormat, match="99"):
        opened(server, tmp_path / "index")


# limits of the server


def test_a_full_server_is_full_and_has_room_again(tmp_path: Path) -> None:
    with running_server(tmp_path / "server") as server:
        backend = opened(server, tmp_path / "index")
        backend.apply([store(A)], at(1))
        server.cli("CONFIG", "SET", "maxmemory", "1")

        with pytest.raises(BackendFull):
            backend.apply([store(B)], at(2))
        assert (backend.cursors()["s"].seq, backend.find(B), len(backend)) == (1, [], 1)
        server.cli("CONFIG", "SET", "maxmemory", "0")
        assert backend.apply([store(B)], at(2)) == ApplyResult(stored=1)
        backend.close()


def test_a_server_that_evicts_keys_is_refused(tmp_path: Path) -> None:
    settings = {"maxmemory": "100mb", "maxmemory-policy": "allkeys-lru"}
    with running_server(tmp_path / "server", settings) as server, pytest.raises(BackendError, match="noeviction"):
        opened(server, tmp_path / "index")


def test_a_batch_may_be_large(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index", timeout_ms=20_000)
    hashes = blocks(*range(1, 60_001))
    assert backend.apply([store(*hashes)], at(1)).stored == 60_000
    assert backend.match(SCOPE, hashes)[0].blocks == 60_000
    assert backend.apply([clear(), store(*hashes[:10])]).cleared == 60_000
    while backend.reclaim(5000):
        pass
    assert sum(1 for _ in backend.snapshot()) == 10
    backend.close()


def test_a_snapshot_is_of_its_first_moment_while_the_index_changes(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(*blocks(*range(1, 3001)))])
    snapshot = backend.snapshot()
    found = [next(snapshot)]
    backend.apply([clear(), store(*blocks(*range(5000, 7000)))])
    while backend.reclaim(1000):
        pass
    backend.clear()
    backend.reclaim(1000)

    found += snapshot
    assert {one.key.block_hash for one in found} == set(blocks(*range(1, 3001)))
    assert len(found) == 3000
    backend.close()


# options


@pytest.mark.parametrize("options", [{"servers": ["nowhere"]}, {"unknown": 1}, {"servers": "x"}])
def test_options_that_cannot_be_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BackendError):
        open_valkey(tmp_path / "index", options)


def test_no_server_at_the_start_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"127\.0\.0\.1:1:"):
        open_valkey(tmp_path / "index", {"servers": ["127.0.0.1:1"], "timeout_ms": 200})


# replicas


def replica_of(primary: ValkeyServer, directory: Path) -> AbstractContextManager[ValkeyServer]:
    return running_server(directory, {"replicaof": f"127.0.0.1 {primary.port}", "repl-diskless-sync-delay": "0"})


def wait_for_replica(primary: ValkeyServer) -> None:
    while int(primary.cli("WAIT", "1", "1000")) != 1:
        pass


def test_a_failover_to_a_replica_that_has_everything_goes_unnoticed(server: ValkeyServer, tmp_path: Path) -> None:
    with replica_of(server, tmp_path / "replica") as replica:
        servers = [replica.address, server.address]
        backend = open_valkey(tmp_path / "index", {"servers": servers, "timeout_ms": 500})
        backend.apply([store(A)], at(1))
        wait_for_replica(server)
        server.kill()
        with pytest.raises(BackendUnavailable):
            backend.apply([store(B)], at(2))
        replica.cli("REPLICAOF", "NO", "ONE")

        assert backend.apply([store(B)], at(2)) == ApplyResult(stored=1)
        assert (len(backend.find(A)), len(backend.find(B))) == (1, 1)
        backend.close()


def test_a_failover_to_a_replica_that_was_behind_fences(server: ValkeyServer, tmp_path: Path) -> None:
    with replica_of(server, tmp_path / "replica") as replica:
        servers = [server.address, replica.address]
        backend = open_valkey(tmp_path / "index", {"servers": servers, "timeout_ms": 500})
        backend.apply([store(A)], at(1))
        wait_for_replica(server)
        replica.cli("REPLICAOF", "127.0.0.1", "1")
        backend.apply([store(B)], at(2))
        server.kill()
        with pytest.raises(BackendUnavailable):
            backend.apply([store(C)], at(3))
        replica.cli("REPLICAOF", "NO", "ONE")

        with pytest.raises(BackendLost, match="older state"):
            backend.apply([store(C)], at(3))
        backend.close()
        again = open_valkey(tmp_path / "index", {"servers": servers, "timeout_ms": 500})
        assert (again.cursors()["s"].seq, len(again)) == (1, 1)
        again.close()


def test_a_server_that_parted_with_the_history_is_not_taken_for_the_other_one(
    server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have as many commits: the last one of the old primary was carried out unknown to anybody."""
    with replica_of(server, tmp_path / "replica") as replica:
        servers = [server.address, replica.address]
        backend = open_valkey(tmp_path / "index", {"servers": servers, "timeout_ms": 500})
        backend.apply([store(A)], at(1))
        wait_for_replica(server)
        replica.cli("REPLICAOF", "127.0.0.1", "1")
        exchange = Server.exchange
        away = []

        def goes_away(self: Server, connection: Any, commands: Any) -> Any:
            ours = connection.port == server.port
            replies = [] if ours and away else exchange(self, connection, commands)
            if ours and (away or commands[-1] == ("EXEC",)):
                away.append(True)
                self._leave()
                raise Disconnected("away")
            return replies

        with monkeypatch.context() as patched:
            patched.setattr(Server, "exchange", goes_away)
            with pytest.raises(BackendUnavailable):
                backend.apply([clear()], at(2))
            replica.cli("REPLICAOF", "NO", "ONE")
            backend.apply([store(B)], at(2))
        replica.kill()

        with pytest.raises(BackendLost):
            backend.apply([store(C)], at(3))
        backend.close()


def test_a_reader_does_not_mix_up_names_of_before_and_after_a_failover(server: ValkeyServer, tmp_path: Path) -> None:
    """What was lost has used numbers of places and scopes that are given again."""
    with replica_of(server, tmp_path / "replica") as replica:
        options = ValkeyOptions(servers=(server.address, replica.address), timeout_ms=500)
        reader = ValkeyReader(Server(options), Keys(options.namespace, options.part))
        backend = ValkeyBackend(tmp_path / "index", options)
        backend.apply([store(A)], at(1))
        wait_for_replica(server)
        replica.cli("REPLICAOF", "127.0.0.1", "1")
        backend.apply([store(B, worker="lost", scope=LORA)], at(2))
        assert [one.worker_id for one in reader.find(B)] == ["lost"]

        server.kill()
        replica.cli("REPLICAOF", "NO", "ONE")
        with pytest.raises(BackendLost):
            apply_until_unavailable(backend, 3)
        backend.close()
        again = ValkeyBackend(tmp_path / "index", options)
        other = IdentityScope("other", "tokenizer")
        again.apply([store(C, worker="new", scope=other)], at(2))

        assert [(one.worker_id, one.key.scope) for one in reader.find(C)] == [("new", other)]
        again.close()


# freeing what is dead


def dead_places(server: ValkeyServer) -> int:
    return int(server.cli("HLEN", "{kvcensus/main}:dead"))


def reclaim_all(backend: ValkeyBackend, rows: int) -> None:
    while backend.reclaim(rows):
        pass


def test_a_clear_whose_answer_was_lost_is_reclaimed_as_well(
    server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(A)], at(1))
    exchange = Server.exchange
    losses = [1]

    def loses_answers(self: Server, connection: Any, commands: Any) -> Any:
        replies = exchange(self, connection, commands)
        if losses[0] and commands[-1] == ("EXEC",):
            losses[0] -= 1
            raise Disconnected("lost")
        return replies

    monkeypatch.setattr(Server, "exchange", loses_answers)

    assert backend.apply([clear()], at(2)).cleared == 1
    assert losses == [0]
    reclaim_all(backend, 100)

    assert dead_places(server) == 0
    backend.close()


def test_a_last_step_of_reclaiming_that_failed_is_made_again(
    server: ValkeyServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = opened(server, tmp_path / "index")
    backend.apply([store(A, worker="gone"), store(B)], at(1))
    backend.apply([clear("gone")], at(2))
    exchange = Server.exchange
    failures = [1]

    def fails(self: Server, connection: Any, commands: Any) -> Any:
        if failures[0] and any(command[:2] == ("HDEL", b"{kvcensus/main}:dead") for command in commands):
            failures[0] -= 1
            raise Disconnected("not sent")
        return exchange(self, connection, commands)

    monkeypatch.setattr(Server, "exchange", fails)
    reclaim_all(backend, 100)

    assert failures == [0]
    assert dead_places(server) == 0
    backend.close()


def test_no_row_is_missed_when_the_server_begins_anew_in_the_middle_of_reclaiming(tmp_path: Path) -> None:
    """Where a walk of a large hash stands means nothing to another process of the server."""
    with running_server(tmp_path / "server", {**DURABLE, "hash-max-listpack-entries": "0"}) as server:
        backend = opened(server, tmp_path / "index")
        backend.apply([store(*blocks(*range(2, 60_000)), worker="gone"), store(A)], at(1))
        backend.apply([clear("gone")], at(2))
        assert backend.reclaim(10_000)

        server.kill()
        server.start()
        backend.apply([], at(3))
        reclaim_all(backend, 10_000)

        rows = sum(int(server.cli("HLEN", f"{{kvcensus/main}}:b:{bucket}")) for bucket in range(256))
        assert (dead_places(server), rows) == (0, 1)
        backend.close()


# a cluster


def test_an_index_of_a_cluster_is_on_one_node_whichever_is_asked(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as nodes:
        for number, node in enumerate(nodes):
            backend = open_valkey(tmp_path / "index", {"servers": [node.address], "timeout_ms": 2000})
            backend.apply([store(block(number + 1))], at(number))
            assert len(backend) == number + 1
            assert len(list(backend.snapshot())) == number + 1
            backend.close()
        sizes = [len(node.cli("KEYS", "{kvcensus/main}*").split()) for node in nodes]
        assert sorted(sizes)[:2] == [0, 0]

        home = nodes[sizes.index(max(sizes))]
        others = [node for node in nodes if node is not home]
        backend = open_valkey(tmp_path / "index", {"servers": [others[0].address], "timeout_ms": 1000})
        home.kill()
        with pytest.raises(BackendUnavailable):
            backend.apply([store(block(9))], at(9))
        home.start()
        deadline = time.monotonic() + 20
        while True:
            try:
                backend.apply([store(block(9))], at(9))
                break
            except BackendUnavailable:
                assert time.monotonic() < deadline
                time.sleep(0.1)
        assert (backend.cursors()["s"].seq, len(backend)) == (9, 4)
        backend.close()


def test_a_slot_that_moves_to_another_node_is_followed(tmp_path: Path) -> None:
    with running_cluster(tmp_path) as nodes:
        backend = open_valkey(tmp_path / "index", {"servers": [nodes[0].address], "timeout_ms": 2000})
        backend.apply([store(*blocks(*range(1, 100)))], at(1))
        slot = nodes[0].cli("CLUSTER", "KEYSLOT", "{kvcensus/main}:meta")
        home = max(nodes, key=lambda node: len(node.cli("KEYS", "{kvcensus/main}*").split()))
        target = next(node for node in nodes if node is not home)
        names = {node.port: node.cli("CLUSTER", "MYID") for node in nodes}
        target.cli("CLUSTER", "SETSLOT", slot, "IMPORTING", names[home.port])
        home.cli("CLUSTER", "SETSLOT", slot, "MIGRATING", names[target.port])
        for moved in (20, 1000):
            keys = home.cli("CLUSTER", "GETKEYSINSLOT", slot, str(moved)).split()
            home.cli("MIGRATE", "127.0.0.1", str(target.port), "", "0", "5000", "KEYS", *keys)
            if moved == 20:
                with pytest.raises(BackendUnavailable):
                    backend.apply([store(*blocks(*range(200, 300)))], at(2))
        for node in (target, home, *nodes):
            node.cli("CLUSTER", "SETSLOT", slot, "NODE", names[target.port])

        assert backend.apply([store(*blocks(*range(200, 300)))], at(2)).stored == 100
        assert len(list(backend.snapshot())) == 199
        backend.close()


def test_a_reader_in_another_process_or_thread_never_sees_half_of_a_batch(server: ValkeyServer, tmp_path: Path) -> None:
    backend = opened(server, tmp_path / "index")
    reader = SharedReader({"servers": [server.address]})
    hashes = blocks(*range(1, 301))
    here = store(*hashes, worker="one")
    there = store(*hashes, worker="two")
    backend.apply([here])
    done = threading.Event()
    seen: list[tuple[str, ...]] = []
    failures: list[BaseException] = []

    def ask() -> None:
        try:
            while not done.is_set():
                matches = reader.match(SCOPE, hashes)
                assert [one.blocks for one in matches] == [300], matches
                seen.append(tuple(one.worker_id for one in matches))
                assert len(backend.prefix_scan(SCOPE, hashes[100])) == 1
        except BaseException as error:  # noqa: BLE001 - the test shows it
            failures.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    for _ in range(100):
        backend.apply([there, clear("one")])
        backend.apply([here, clear("two")])
        backend.reclaim(500)
    done.set()
    asking.join()
    assert not failures
    assert len(set(seen)) == 2
    reader.close()
    backend.close()
