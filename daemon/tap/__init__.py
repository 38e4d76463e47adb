"""The messages of a live stream, decoded by the daemon's own translators, for somebody who watches.

Pure: `decoding`, `wording`. `zmq_feed` and `nats_feed` receive, each in a thread of its own; `inbox` is between.
"""
