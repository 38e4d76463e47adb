"""A live view of a running daemon, asked over HTTP.

Pure: `sample`, `rates`, `figures`, `rows`, `words`. `looking` asks the daemon, `screen` and `details` draw.
"""
