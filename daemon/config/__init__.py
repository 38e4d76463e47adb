"""The daemon's configuration: one TOML file, environment overrides, flags."""

from .errors import EXIT_CONFIG, ConfigError, InvalidValue
from .load import config_from_flags, load_config
from .model import (
    BackendKind,
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
from .source import OnHole, SourceConfig, SourceType, StreamConfig
from .translated import OnFence

__all__ = [
    "EXIT_CONFIG",
    "BackendKind",
    "Config",
    "ConfigError",
    "HttpConfig",
    "IndexConfig",
    "InvalidValue",
    "LogConfig",
    "LogFormat",
    "LogLevel",
    "OnCorrupt",
    "OnFence",
    "OnHole",
    "QuarantineConfig",
    "SourceConfig",
    "SourceType",
    "StreamConfig",
    "WriterConfig",
    "config_from_flags",
    "load_config",
]
