"""Measurements that a user can repeat: ingest beside its limits, queries, and memory against the size of the index.

Every figure is taken in the same run as the limit it is compared with, and a run ends when the last block is committed.
"""
