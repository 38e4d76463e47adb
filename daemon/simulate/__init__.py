"""A simulated engine: a block manager whose true state can be read, behind the sockets of a real one.

`workload` says what is asked of the engine, `cache` which blocks it then holds and what it reports, `wire` how a
release writes that down, `rank` puts the three together as one numbered stream, all of it pure and seeded. `engine`
gives ranks their sockets, and `truth` answers what they really hold.

What it does not have: token budgets, priorities, speculative decoding, connectors other than one that offloads to the
CPU, multimodal prompts.
"""
