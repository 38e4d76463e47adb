"""The daemon's configuration: one TOML file, environment overrides, flags."""

from .errors import EXIT_CONFIG, ConfigError, InvalidValue
from .filesystem import FilesystemConfig
from .load import config_from_flags, load_config
from .model import (
    Config,
    HttpConfig,
    IndexConfig,
    LogConfig,
    LogFormat,
    LogLevel,
    OnCorrupt,
    QuarantineConfig,
    WriterConfig,
)
from .nats import NatsConfig
from .nats_servers import NatsServers
from .relay import RelayConfig
from .rocksdb import RocksdbConfig
from .shadow import ShadowConfig
from .source import OnHole, SourceConfig, SourceType, StreamConfig
from .translated import OnFence
from .valkey import ValkeyConfig

__all__ = [
    "EXIT_CONFIG",
    "Config",
    "ConfigError",
    "FilesystemConfig",
    "HttpConfig",
    "IndexConfig",
    "InvalidValue",
    "LogConfig",
    "LogFormat",
    "LogLevel",
    "NatsConfig",
    "NatsServers",
    "OnCorrupt",
    "OnFence",
    "OnHole",
    "QuarantineConfig",
    "RelayConfig",
    "RocksdbConfig",
    "ShadowConfig",
    "SourceConfig",
    "SourceType",
    "StreamConfig",
    "ValkeyConfig",
    "WriterConfig",
    "config_from_flags",
    "load_config",
]
