"""What a bad event must not cost: the good ones before and after it."""

from collections.abc import Callable
from typing import Any

import msgspec

from kvcensus.translators.translation import Rejection, Translation

pack = msgspec.msgpack.encode


def rejection_between(translate: Callable[[bytes], Translation], good: list[Any], event: Any) -> Rejection:
    """The rejection of an event that stands between a store and a removal, of which nothing is lost."""
    before, after = good
    translation = translate(pack([1.5, [before, event, after], 0]))
    assert translation.operations == translate(pack([1.5, good, 0])).operations
    assert (translation.stored_events, translation.removed_events) == (1, 1)
    (rejection,) = translation.rejections
    assert rejection.event == 1
    assert rejection.raw == pack(event)
    assert rejection.detail
    return rejection
