"""Typed configuration of a run. Imports no torch."""

from scale.config.loader import differences, flatten, load_config, parse_config, stored_config, to_yaml
from scale.config.run import PretrainRun

__all__ = ["PretrainRun", "differences", "flatten", "load_config", "parse_config", "stored_config", "to_yaml"]
