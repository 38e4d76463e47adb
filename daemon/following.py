"""The stream that a source of the configuration asks for."""

from __future__ import annotations

from kvcensus.backends.model import Cursor

from .config import OnFence, OnHole, SourceConfig, StreamConfig
from .engines import ENGINE_TRANSLATORS
from .followed import FollowedStream
from .streams.state import StreamLimits


def stream_of(source: SourceConfig, stream: StreamConfig, cursor: Cursor | None) -> FollowedStream:
    """A stream, to be followed from its cursor on."""
    return FollowedStream(
        source=stream.source,
        stream=stream.stream,
        rank=stream.rank,
        endpoint=stream.endpoint,
        limits=StreamLimits(
            replay=bool(stream.replay_endpoint),
            replay_timeout_ms=source.replay_timeout_ms,
            replay_attempts=source.replay_attempts,
            hold_max_messages=source.hold_max_messages,
            probe_ms=source.probe_ms,
            lease_ms=source.lease_ms,
            tolerate_holes=source.on_hole is OnHole.TOLERATE,
        ),
        translator=ENGINE_TRANSLATORS[source.type](source.options_of(source.name)),
        cursor=cursor,
        keeps_fenced=source.on_fence is OnFence.KEEP,
        stale_after_ms=source.stale_after_ms,
        silent_after_ms=source.silent_after_ms,
        engine=source.type,
    )
