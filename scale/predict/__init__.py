"""A world model of the run, and a stepper that skips the passes it can foresee.

`wrap` gives it to any torch training loop: `from scale.predict import wrap`.
"""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "wrap":  # late: the packages it needs are imported by path without it
        from scale.predict.wrap_loop import wrap

        return wrap
    raise AttributeError(f"module {__name__} has no attribute {name}")
