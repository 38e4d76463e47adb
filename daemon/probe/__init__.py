"""What is really at the sources of a configuration: connects to each, looks for some seconds, and says what it found.

Pure: `releases`, `dynamo_releases`, `stream_look`, `bus_look`, `findings`, `words`. The shells are `zmq_probe` and
`nats_probe`; `probing` runs them.
"""
