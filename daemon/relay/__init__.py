"""The relay: an engine's untouched messages, published to JetStream by a process beside the engine.

`convention` says what a message looks like on the bus, `spool` keeps what is not acknowledged yet, `spooler` fills it
from the streams, `publisher` empties it, `service` wires them together.
"""
