"""An index in RocksDB. Only `backend`, `store` and what uses them need `rocksdict`."""
