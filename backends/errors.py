"""What can go wrong in a backend.

BackendError
 +-- BackendBusy      another process owns the data
 +-- BackendFull      no room left; the last apply changed nothing
 +-- BackendFormat    the data was written by an unknown schema
 +-- BackendCorrupt   the data cannot be trusted; rebuild it from the engines
"""


class BackendError(Exception):
    """A backend cannot do what was asked. The message says what to do."""


class BackendBusy(BackendError):
    """Another process owns the data directory."""


class BackendFull(BackendError):
    """The store has no room left. Nothing of the failed call was applied."""


class BackendFormat(BackendError):
    """The data was written by a schema this version does not know. It is never deleted by itself."""


class BackendCorrupt(BackendError):
    """The data is damaged or cannot be read safely."""
