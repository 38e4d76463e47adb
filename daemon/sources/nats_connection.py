"""One connection to NATS at a time, without surprises: it ends for good, it never sends a secret in the clear where
TLS was asked for, and what the server has against us becomes a sentence.

nats-py's own reconnecting is switched off. Reconnecting by itself it retries refused credentials for ever, says nothing
of a subscription that was refused, and hides that messages may have been missed. Whoever connects here tries again.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from contextlib import suppress
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from nats import errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from ..config import NatsServers
from ..credentials import CredentialError
from ..nats_credentials import client_tls, read_nkey_seed, read_secret_line, read_user_credentials
from .nats_headers import VERSION_LINE, Headers
from .nats_problems import NatsProblem, NoAnswer, not_connected, not_permitted, violation

_CLOSE_S = 0.5
"""How long a connection may take to say goodbye: nats-py waits for ever after a failed TLS handshake."""
_MOST_DISCOVERED = 64
_UNANSWERED_PINGS = 2
_NO_BOUND = 0
"""Of what waits to be sent: beyond one nats-py waits 10 s at each message to a server that does not read. Whoever
publishes here has a bound of its own."""

Callback = Callable[[Msg], Awaitable[None]]
TakeAtOnce = Callable[[bytes, bytes, bytes, bytes], bool]
"""Takes a message by its subject, reply, headers and payload. False when it is to take the way of the others."""


class _Client(Client):
    """nats-py's client, which does not go on in the clear when the server offers no TLS, and reads headers faster."""

    def __init__(self, servers: NatsServers, url: str) -> None:
        super().__init__()
        self._servers = servers
        self._url = url
        self.offer: dict[str, Any] = {}
        """What the server said of itself."""
        self.at_once: dict[int, TakeAtOnce] = {}
        """By the number of a subscription."""

    async def _process_info(self, info: dict[str, Any], initial_connection: bool = False) -> None:
        if initial_connection:
            self.offer = info
            if self._servers.needs_tls:
                # nats-py speaks TLS only where the server insists on it.
                info["tls_required"] = info.get("tls_required", False) or info.get("tls_available", False)
                if not info["tls_required"]:
                    raise NatsProblem(f"{self._url} offers no TLS, which was asked for: nothing was sent to it")
        await super()._process_info(info, initial_connection)

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, data: bytes, headers: bytes) -> None:
        """nats-py makes an object of each message, which waits for a task. Behind one that waits, all others wait."""
        take, subscription = self.at_once.get(sid), self._subs.get(sid)
        if take is not None and subscription is not None and subscription._pending_queue.empty():
            try:
                if take(subject, reply, headers or b"", data):
                    return
            except Exception as error:  # noqa: BLE001 - as nats-py does with those of a callback
                await self._error_cb(error)
                return
        await super()._process_msg(sid, subject, reply, data, headers)

    async def _process_headers(self, headers: bytes | None) -> Any:
        """nats-py reads the headers of each message, which takes a third of the time of a message."""
        if headers and headers.startswith(VERSION_LINE):
            return Headers(headers)
        return await super()._process_headers(headers)


class NatsConnection:
    """One connection, from when the server has let us in until it is lost. Used in one event loop."""

    def __init__(self, client: _Client, url: str, servers: NatsServers) -> None:
        self.client: Client = client
        self._at_once = client.at_once
        self.url = url
        self._offer = client.offer
        self._servers = servers
        self._subjects: dict[str, str] = {}
        self._requests: dict[asyncio.Future[bytes], str] = {}
        self.refused: dict[str, str] = {}
        """Subjects that the server refused, with a sentence each."""
        self.failure: Exception | None = None
        """What a callback of ours raised: nats-py keeps it to itself."""
        self.dropped: Callable[[str], None] = lambda subject: None
        """Called with the subject of each message that found too many waiting."""
        self.complained: Callable[[str], None] = lambda problem: None
        """Called with a sentence when the server refuses a subject that nobody waits for: a request raises it."""
        self.lost: Callable[[], None] = lambda: None
        """Called when it has ended. It may be `is_lost` some time before."""

    @property
    def is_lost(self) -> bool:
        """Whether it has ended."""
        return self.client.is_closed

    @property
    def version(self) -> tuple[int, ...]:
        """That of the server, as in (2, 10, 1)."""
        numbers = str(self._offer.get("version", "0")).partition("-")[0].split(".")
        return tuple(int(one) if one.isdecimal() else 0 for one in numbers)

    @property
    def version_text(self) -> str:
        return str(self._offer.get("version", "of unknown version"))

    @property
    def uses_tls(self) -> bool:
        """Whether it is encrypted."""
        return self._servers.tls_first or bool(self._offer.get("tls_required"))

    @property
    def jetstream(self) -> str:
        """What the subjects of requests to JetStream begin with."""
        domain = self._servers.jetstream_domain
        return f"$JS.{domain}.API" if domain else "$JS.API"

    @property
    def jetstream_place(self) -> str:
        """Where JetStream is asked, for a sentence."""
        domain = self._servers.jetstream_domain
        return f"{self.url} in domain {domain}" if domain else self.url

    def why_lost(self) -> str:
        """A sentence on its end."""
        error = self.client.last_error or errors.UnexpectedEOF()
        return not_connected(error, self.url, self._servers, {})

    async def subscribe(
        self,
        subject: str,
        callback: Callback,
        *,
        max_messages: int,
        max_bytes: int,
        at_once: TakeAtOnce | None = None,
    ) -> Subscription:
        """Subscribe, and make sure that the server has it. Raises NatsProblem when it refuses.

        `max_messages` and `max_bytes` may wait for the callback; what comes beyond is dropped. 0 is no bound. While
        none waits, `at_once` is asked first.
        """
        self._note(subject)
        try:
            subscription = await self.client.subscribe(
                subject, cb=callback, pending_msgs_limit=max_messages, pending_bytes_limit=max_bytes
            )
            # nats-py sends the first ping before the subscription that waits to be written, and only that.
            await self.client.flush(self._timeout_s)
            await self.client.flush(self._timeout_s)
        except (errors.Error, OSError) as error:
            raise NatsProblem(self._failed(error)) from error
        if problem := self.refused.get(subject):
            await self.unsubscribe(subscription)
            raise NatsProblem(problem)
        if at_once is not None:
            self._at_once[subscription._id] = at_once
        return subscription

    async def unsubscribe(self, subscription: Subscription) -> None:
        """End a subscription, whether or not the server has it."""
        self._at_once.pop(subscription._id, None)
        with suppress(errors.Error, OSError):
            await subscription.unsubscribe()

    async def request(self, subject: str, payload: bytes = b"") -> bytes:
        """The answer to a request. Raises NoAnswer when nobody serves the subject, NatsProblem otherwise."""
        self._note(subject)
        refused: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        asked = asyncio.ensure_future(self.client.request(subject, payload, timeout=self._timeout_s))
        self._requests[refused] = subject
        try:
            either: list[asyncio.Future[Any]] = [asked, refused]
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if refused.done():
                return refused.result()
            return asked.result().data
        except errors.NoRespondersError as error:
            raise NoAnswer(f"{self.url}: nobody answers on {subject}") from error
        except errors.TimeoutError as error:
            raise NatsProblem(
                f"{self.url}: no answer on {subject} within {self._servers.connect_timeout_ms} ms"
            ) from error
        except (errors.Error, OSError) as error:
            raise NatsProblem(self._failed(error)) from error
        finally:
            del self._requests[refused]
            asked.cancel()
            refused.cancel()

    async def publish(
        self, subject: str, payload: bytes, reply: str = "", headers: dict[str, str] | None = None
    ) -> None:
        """Send a message. Raises NatsProblem without a connection."""
        self._note(subject)
        try:
            await self.client.publish(subject, payload, reply, headers)
        except (errors.Error, OSError) as error:
            raise NatsProblem(self._failed(error)) from error

    async def close(self) -> None:
        """End it, whatever state it is in."""
        await _close(self.client)

    @property
    def _timeout_s(self) -> Any:
        """nats-py says that it wants an int, and takes a float."""
        return self._servers.connect_timeout_ms / 1000

    def _failed(self, error: Exception) -> str:
        return self.why_lost() if self.is_lost else not_connected(error, self.url, self._servers, {})

    def _note(self, subject: str) -> None:
        self._subjects[subject.lower()] = subject
        self.refused.pop(subject, None)

    async def report(self, error: Exception) -> None:
        """What nats-py tells of while the connection lives."""
        if isinstance(error, errors.SlowConsumerError):
            self.dropped(error.subject)
        elif found := violation(error):
            what, lower = found
            subject = self._subjects.get(lower, lower)
            problem = not_permitted(self._servers, what, subject)
            self.refused[subject] = problem
            # Answers come to a subject of nats-py's choice.
            asking = [one for one, asked in self._requests.items() if asked == subject or lower.startswith("_inbox.")]
            for waiting in asking:
                if not waiting.done():
                    waiting.set_exception(NatsProblem(problem))
            if not asking:
                self.complained(problem)
        elif not isinstance(error, errors.Error | OSError | TimeoutError):
            self.failure = error


class NatsConnector:
    """Makes connections to the servers of one section, and to those that they name."""

    def __init__(self, servers: NatsServers, name: str) -> None:
        """`name` is what the servers show of us."""
        self._servers = servers
        self._name = name
        self._discovered: dict[str, str] = {}
        """URLs, each with the host whose certificate it may show."""

    async def connect(self) -> NatsConnection:
        """Try each server once, in an order of chance. Raises NatsProblem with what each of them had against it."""
        configured = list(self._servers.servers)
        random.shuffle(configured)
        problems: list[str] = []
        for url in [*configured, *self._discovered]:
            try:
                return await self._connect_to(url)
            except NatsProblem as problem:
                if url in configured or not problems:
                    problems.append(str(problem))
        raise NatsProblem("; ".join(dict.fromkeys(sorted(problems))))

    async def _connect_to(self, url: str) -> NatsConnection:
        servers = self._servers
        client = _Client(servers, url)
        connection: NatsConnection | None = None
        last_error: list[Exception] = []

        async def report(error: Exception) -> None:
            last_error[:] = [error]
            if connection is not None:
                await connection.report(error)

        async def closed() -> None:
            if connection is not None:
                connection.lost()

        timeout_s = servers.connect_timeout_ms / 1000
        try:
            options = self._credentials()
            async with asyncio.timeout(timeout_s):
                await client.connect(
                    [url],
                    error_cb=report,
                    closed_cb=closed,
                    name=self._name,
                    allow_reconnect=False,
                    max_reconnect_attempts=1,
                    pending_size=_NO_BOUND,
                    reconnect_time_wait=0,
                    connect_timeout=timeout_s,  # type: ignore[arg-type]
                    ping_interval=servers.ping_interval_ms / 1000,  # type: ignore[arg-type]
                    max_outstanding_pings=_UNANSWERED_PINGS,
                    tls_handshake_first=servers.tls_first,
                    tls_hostname=self._discovered.get(url),
                    **options,
                )
            if not client.is_connected:
                raise errors.UnexpectedEOF
        except Exception as error:
            await _close(client)
            cause = last_error[0] if last_error and isinstance(error, errors.NoServersError | TimeoutError) else error
            raise NatsProblem(not_connected(cause, url, servers, client.offer)) from error
        except BaseException:
            await _close(client)
            raise
        self._discover(client, url)
        connection = NatsConnection(client, url, servers)
        return connection

    def _credentials(self) -> dict[str, Any]:
        """Read anew each time: secrets are replaced while we run. Raises CredentialError."""
        servers = self._servers
        options: dict[str, Any] = {}
        if servers.credentials_file:
            user = read_user_credentials(servers.credentials_file)
            options |= {"user_jwt_cb": user.token, "signature_cb": user.sign}
        elif servers.nkey_file:
            options["nkeys_seed_str"] = read_nkey_seed(servers.nkey_file)
        elif servers.user:
            options |= {"user": servers.user, "password": read_secret_line(servers.password_file)}
        elif servers.token_file:
            options["token"] = read_secret_line(servers.token_file)
        if servers.needs_tls:
            options["tls"] = client_tls(servers.tls_ca_file, servers.tls_certificate_file, servers.tls_key_file)
        return options

    def _discover(self, client: Client, url: str) -> None:
        """Remember the other servers of a cluster, should all that are configured be down.

        They are often named by address, and prove to be of the host that named them, as other clients see it.
        """
        scheme, host = url.partition("://")[0], self._discovered.get(url) or urlsplit(url).hostname or ""
        named = [one.netloc for one in client.discovered_servers[:_MOST_DISCOVERED]]
        found = {f"{scheme}://{one}": host if _is_address(one) else one.rpartition(":")[0] for one in named}
        self._discovered = {one: host for one, host in found.items() if one not in self._servers.servers}


def _is_address(netloc: str) -> bool:
    try:
        ip_address(netloc.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return True


class Backoff:
    """Waits between attempts: they double from `reconnect_min_ms` to `reconnect_max_ms`."""

    def __init__(self, servers: NatsServers) -> None:
        self._servers = servers
        self._next_ms = servers.reconnect_min_ms

    def reset(self) -> None:
        """It worked."""
        self._next_ms = self._servers.reconnect_min_ms

    def next_s(self) -> float:
        """How long to wait now."""
        wait_ms, self._next_ms = self._next_ms, min(2 * self._next_ms, self._servers.reconnect_max_ms)
        return wait_ms / 1000


async def _close(client: Client) -> None:
    # An assertion fails in nats-py when it never got as far as a server.
    with suppress(errors.Error, OSError, TimeoutError, AssertionError, CredentialError):
        async with asyncio.timeout(_CLOSE_S):
            await client.close()
    # Otherwise what a server did not read would wait on, and be sent once it does, behind what a later one was sent.
    writer = getattr(client._transport, "_io_writer", None)
    if writer is not None:
        writer.transport.abort()
