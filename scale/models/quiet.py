"""Warnings and progress bars of other packages that no user could act on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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


def quiet_bars() -> None:
    """Loading and saving models draws no bars. Those of downloads, which take minutes, stay."""
    from transformers.utils.logging import set_tqdm_hook

    set_tqdm_hook(_without_bar)


def _without_bar(make: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return make(*args, **{**kwargs, "disable": True})
