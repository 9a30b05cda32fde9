"""Warnings of other packages that no user could act on."""

from __future__ import annotations

import logging

_TOLD = {
    "torchao": "Failed to load",  # parts compiled for other machines
    "torch.utils._pytree": "register_constant",  # torchao registers what torch has come to know by itself
}


class _Without(logging.Filter):
    """Drops messages with a given text."""

    def filter(self, record: logging.LogRecord) -> bool:
        return self.name not in record.getMessage()


def quiet_torchao() -> None:
    """Importing torchao, which transformers does where it is installed, then says nothing. May be called again."""
    for name, text in _TOLD.items():
        logger = logging.getLogger(name)
        if not any(isinstance(known, _Without) for known in logger.filters):
            logger.addFilter(_Without(text))
