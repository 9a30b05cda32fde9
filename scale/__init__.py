"""Scale trains language models from one laptop to a GPU cluster; see `scale.api`."""

__version__ = "0.1.0"
