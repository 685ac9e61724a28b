"""The configuration of a run: its settings, where they are read from, and their checks."""

from fed_diffusion.config.load import (
    Config,
    ConfigError,
    build_config,
    conf_dir,
    load_config,
    load_preset,
    method_name,
    parse_pairs,
    presets,
    read_value,
    refuse_overlaps,
    with_overrides,
)

__all__ = [
    "Config",
    "ConfigError",
    "build_config",
    "conf_dir",
    "load_config",
    "load_preset",
    "method_name",
    "parse_pairs",
    "presets",
    "read_value",
    "refuse_overlaps",
    "with_overrides",
]
