"""The JetStream stream that the relay publishes to: whether it is there, and making it if the configuration says so."""

from __future__ import annotations

import msgspec
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import RetentionPolicy, StorageType, StreamConfig
from nats.js.errors import APIError, NotFoundError, ServiceUnavailableError

from ..logs import get_logger
from .convention import every_subject
from .publisher import PublishProblem

_ASK_S = 2.0
"""How long to wait for what the server says of a stream. Who may not ask gets no answer, and publishes without."""

log = get_logger("relay")


class StreamOptions(msgspec.Struct, frozen=True):
    """The stream `name`, and what to make of it where it is missing. 0: no limit."""

    name: str
    prefix: str
    create: bool
    max_age_s: int
    max_bytes: int
    replicas: int
    duplicates_s: int


class RelayStream:
    """Looks after the stream on each connection."""

    def __init__(self, options: StreamOptions) -> None:
        self._options = options

    async def prepare(self, client: Client) -> None:
        """Raises PublishProblem when the stream is not there and is not to be made, or cannot be."""
        options = self._options
        context = client.jetstream(timeout=_ASK_S)
        try:
            found = await context.stream_info(options.name)
        except NotFoundError:
            await self._create(client)
        except ServiceUnavailableError as error:
            raise PublishProblem("the server has no JetStream, or no leader for it") from error
        except APIError as error:
            raise PublishProblem(f"stream {options.name}: {error.description} (error {error.err_code})") from error
        except (NatsError, TimeoutError) as error:
            log.debug("stream_not_asked_for", stream=options.name, error=repr(error))
        else:
            self._check(found.config)

    def _check(self, config: StreamConfig) -> None:
        if config.no_ack:
            raise PublishProblem(f"stream {self._options.name} acknowledges nothing (no_ack)")

    async def _create(self, client: Client) -> None:
        options = self._options
        if not options.create:
            raise PublishProblem(f"stream {options.name} does not exist; make it, or set create_stream = true")
        subjects = [every_subject(options.prefix)]
        config = StreamConfig(
            name=options.name,
            subjects=subjects,
            retention=RetentionPolicy.LIMITS,
            storage=StorageType.FILE,
            max_age=options.max_age_s,
            max_bytes=options.max_bytes or -1,
            num_replicas=options.replicas,
            duplicate_window=options.duplicates_s,
        )
        try:
            await client.jetstream(timeout=_ASK_S).add_stream(config)
        except APIError as error:
            raise PublishProblem(f"stream {options.name} cannot be made: {error.description}") from error
        except (NatsError, TimeoutError) as error:
            raise PublishProblem(f"stream {options.name} cannot be made: {error or 'no answer'}") from error
        log.info("stream_made", stream=options.name, subjects=subjects)
