"""A verb prints what its user needs: nothing of what libraries tell their own developers."""

from __future__ import annotations

import logging
import os
import warnings

_LIBRARIES = ("transformers", "peft", "accelerate", "bitsandbytes", "torchao", "liger_kernel", "huggingface_hub",
              "datasets", "triton", "kernels", "DeepSpeed", "deepspeed", "torch.utils._pytree",
              "torch.distributed.elastic")  # fmt: skip
_WARNERS = r"(transformers|peft|accelerate|bitsandbytes|torchao|liger_kernel|huggingface_hub|datasets|deepspeed)\b"
"""Modules whose Python warnings are about their own future, or about choices that we check ourselves."""


class _ErrorsOnly(logging.Filter):
    """Drops records below ERROR. A filter, as libraries set the level of their loggers when they are imported."""

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR


_errors_only = _ErrorsOnly()


def quiet_libraries() -> None:
    """Let libraries print errors alone. Imports none of them: call it before they are; calling again changes nothing.

    What a user has set in the environment (TRANSFORMERS_VERBOSITY, TORCH_CPP_LOG_LEVEL) stays. Warnings of torch itself
    stay too, as some of them tell of a GPU that it cannot use.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in _LIBRARIES:
        logger = logging.getLogger(name)
        logger.addFilter(_errors_only)  # for records of this very logger
        logger.setLevel(logging.ERROR)  # for its children, which ask upwards
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module=_WARNERS)
