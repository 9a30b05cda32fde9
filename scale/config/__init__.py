"""Typed configuration of a run. Imports no torch."""

from scale.config.loader import differences, load_config, to_yaml
from scale.config.run import PretrainRun

__all__ = ["PretrainRun", "differences", "load_config", "to_yaml"]
