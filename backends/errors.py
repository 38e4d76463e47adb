"""What can go wrong in a backend.

BackendError
 +-- BackendBusy      another process owns the data
 |    +-- BackendPidClash   another process has our process id
 +-- BackendFull      no room left; the last apply changed nothing
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


class BackendFormat(BackendError):
    """The data was written by a schema this version does not know. It is never deleted by itself."""

    problem = "format"


class BackendCorrupt(BackendError):
    """The data is damaged or cannot be read safely."""

    problem = "corrupt"
