"""What can go wrong, and whether it excuses a worker that is not believed afterwards."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Excuse(StrEnum):
    """What a fault excuses. `none`: the daemon can know everything again, so it must."""

    NONE = "none"
    UNTRUSTED = "untrusted"
    """The worker may be untrusted, and then its blocks are a part of the true ones."""
    REFUSED = "refused"
    """The worker may be untrusted because a message was refused; what that message said is then missing."""


class Fault(StrEnum):
    """Names as in `--faults`."""

    KILL = "kill"
    TERM = "term"
    FREEZE = "freeze"
    RESTART = "restart"
    OVERTAKE = "overtake"
    RESET = "reset"
    LOSE_RING = "lose-ring"
    DROP = "drop"
    UNPUBLISHED = "unpublished"
    DUPLICATE = "duplicate"
    REORDER = "reorder"
    MALFORM = "malform"
    CORRUPT = "corrupt"
    DISCONNECT = "disconnect"
    OUTAGE = "outage"
    CLOCK = "clock"
    MUTE = "mute"
    EARLY = "early"
    LATE = "late"
    FUTURE = "future"
    FORGE = "forge"
    HOLES = "holes"
    NO_END = "no-end"
    FULL_MAP = "full-map"
    FULL_DISK = "full-disk"
    PARTITION = "partition"


class About(msgspec.Struct, frozen=True):
    """One fault: what is done, what it excuses, whether it `lasts` for some steps, or concerns the whole daemon."""

    what: str
    excuse: Excuse = Excuse.NONE
    lasts: bool = False
    of_daemon: bool = False


ABOUT = {
    Fault.KILL: About("kill -9 of the daemon", of_daemon=True),
    Fault.TERM: About("SIGTERM of the daemon, which must end with 0", of_daemon=True),
    Fault.FREEZE: About("the daemon stands still while more is published than the sockets hold", of_daemon=True),
    Fault.RESTART: About("the engine restarts; messages on their way, ring and cache are lost"),
    Fault.OVERTAKE: About("the engine restarts and is past its old number before the daemon sees it again"),
    Fault.RESET: About("the numbers and the cache start anew on the same sockets"),
    Fault.LOSE_RING: About("the replay ring is emptied", Excuse.UNTRUSTED),
    Fault.DROP: About("live messages are lost; the ring has them"),
    Fault.UNPUBLISHED: About("a number is used up and never published", Excuse.UNTRUSTED),
    Fault.DUPLICATE: About("live messages are sent again"),
    Fault.REORDER: About("live messages come in another order"),
    Fault.MALFORM: About("a live message lacks a frame, or half of its number"),
    Fault.CORRUPT: About("the payload of a live message is cut or damaged", Excuse.REFUSED),
    Fault.DISCONNECT: About("the live socket is closed and bound again, with messages lost in between"),
    Fault.OUTAGE: About("both sockets are closed for a while; the engine works on"),
    Fault.CLOCK: About("the engine's clock jumps by hours"),
    Fault.MUTE: About("the replay socket gives no answer", Excuse.UNTRUSTED, lasts=True),
    Fault.EARLY: About("the replay socket answers from its oldest message, whatever was asked", lasts=True),
    Fault.LATE: About("the replay socket answers from a later number than asked", Excuse.UNTRUSTED, lasts=True),
    Fault.FUTURE: About("the replay socket adds a message of a number far ahead", Excuse.UNTRUSTED, lasts=True),
    Fault.FORGE: About("the replay socket gives its first message another time", lasts=True),
    Fault.HOLES: About("every other replay has a hole, and the end marker", lasts=True),
    Fault.NO_END: About("replays come without the end marker", Excuse.UNTRUSTED, lasts=True),
    Fault.FULL_MAP: About("the index's address space is too small for a while", of_daemon=True),
    Fault.FULL_DISK: About("the disk of the index is full for a while", of_daemon=True),
    Fault.PARTITION: About("the link between the daemon's network namespace and the engines goes down for a while"),
}


class UnknownFault(ValueError):
    """A name that is no fault."""


def parse_faults(text: str) -> tuple[Fault, ...]:
    """`all`, or names with commas between them. Raises UnknownFault."""
    if text == "all":
        return tuple(Fault)
    try:
        return tuple(dict.fromkeys(Fault(name.strip()) for name in text.split(",") if name.strip()))
    except ValueError as error:
        raise UnknownFault(f"{error}; there are: {', '.join(Fault)}") from error
