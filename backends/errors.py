"""What can go wrong in a backend.

BackendError
 +-- BackendBusy      another process owns the data
 |    +-- BackendPidClash   another process has our process id
 +-- BackendFull      no room left; the last apply changed nothing
 +-- BackendUnavailable   the server that has the data does not answer; the same call again is right
 +-- BackendLost      the server has lost what it had promised; begin again from the cursors that it has
 +-- BackendUnsupported   the backend has no way to do this
 +-- BackendFormat    the data was written by an unknown schema
 +-- BackendCorrupt   the data cannot be trusted; rebuild it from the engines
"""


class BackendError(Exception):
    """A backend cannot do what was asked. The message says what to do, `problem` names it in logs."""

    problem = "error"


class BackendBusy(BackendError):
    """Another process owns the data directory."""

    problem = "busy"


class BackendPidClash(BackendBusy):
    """Another process reads the data that has the same process id, in another namespace."""

    problem = "pid_clash"


class BackendFull(BackendError):
    """The store has no room left. Nothing of the failed call was applied."""

    problem = "full"


class BackendUnavailable(BackendError):
    """The server that has the data cannot be reached or does not write now. The same call is to be made again.

    It takes effect once, even where the answer to the first one was lost.
    """

    problem = "unavailable"


class BackendLost(BackendError):
    """The server no longer has what it had committed: it was emptied, or has gone back to an older state.

    What it has fits its cursors. Open the backend again and go on from them.
    """

    problem = "lost"


class BackendUnsupported(BackendError):
    """The backend has no way to do this, now or later."""

    problem = "unsupported"


class BackendFormat(BackendError):
    """The data was written by a schema this version does not know. It is never deleted by itself."""

    problem = "format"


class BackendCorrupt(BackendError):
    """The data is damaged or cannot be read safely."""

    problem = "corrupt"
