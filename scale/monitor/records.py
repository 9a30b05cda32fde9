"""metrics.jsonl: one strict JSON object per step, cut back to the checkpoint when a run resumes.

Every row has every field of `FIELDS`; what does not apply, or is not finite, is null. Rows depend on the steps alone
except for `TIME_FIELDS`, so a resumed run writes the rows an uninterrupted one would have written.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from scale.errors import ScaleError
from scale.files import fsync, write_atomic
from scale.monitor.kept import BrokenRows, Kept, first_lines
from scale.protocols import Score, StepReport

WINDOW = 30
"""Losses that the velocity is fitted to."""
VANISHING, EXPLODING = 0.01, 100.0
"""A layer's gradient norm vanishes below, or explodes above, this multiple of the median over layers of its step."""
TIME_FIELDS = frozenset({"timestamp", "step_time_ms", "tokens_per_second", "mfu", "memory_bytes"})
"""Fields that depend on the clock or the machine; all others are the same again after a resume."""
FIELDS = (
    "step",
    "loss",
    "gradient_norm",
    "phase",
    "was_predicted",
    "predicted_loss",
    "confidence",
    "prediction",
    "ledger",
    "step_time_ms",
    "timestamp",
    "tokens",
    "tokens_per_second",
    "mfu",
    "memory_bytes",
    "learning_rate",
    "perplexity",
    "val_loss",
    "val_by_source",
    "train_val_gap",
    "loss_velocity",
    "loss_acceleration",
    "gradient_entropy",
    "layer_gradients",
    "layer_gradient_max",
    "layer_gradient_min",
    "layer_gradient_mean",
    "layer_gradient_vanishing",
    "layer_gradient_exploding",
    "sources",
    "seq_len",
    "skipped",
    "forward_passes",
    "backward_passes",
    "forward_tokens",
    "backward_tokens",
    "metrics",
)
_COUNTERS = ("tokens", "forward_passes", "backward_passes", "forward_tokens", "backward_tokens")


class Metrics:
    """Writer of metrics.jsonl. Stateful: counters, the losses of the window and the last velocity. `kept` sums up the lines
    of the file."""

    def __init__(self, path: Path):
        self.path = path
        self.kept = Kept()
        self.totals = dict.fromkeys(_COUNTERS, 0)
        self._losses: list[tuple[int, float]] = []
        self._velocity: float | None = None

    def row(self, report: StepReport, val: Score | None, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The row of one step; advances the counters and the loss window, so call it once per step.

        tokens, forward_* and backward_*: sums since the run began. perplexity: exp(loss). train_val_gap: val_loss - loss.
        loss_velocity: least-squares slope (loss per step) over the last `WINDOW` losses, skipped steps left out;
        loss_acceleration: its change since the step before. sources: share of all tokens drawn, by data source.
        predicted_loss: what was foreseen, never mixed with `loss`; ledger: counts since the run began.
        `extra` adds fields or fills null ones (mfu, memory_bytes).
        """
        for name in _COUNTERS:
            self.totals[name] += getattr(report, name)
        velocity, acceleration = self._follow(report)
        drawn = sum(report.sources.values())
        return {
            **dict.fromkeys(FIELDS),
            **self.totals,
            "step": report.step,
            "loss": report.loss,
            "gradient_norm": report.grad_norm,
            "phase": report.kind,
            "was_predicted": report.kind == "predict",
            "step_time_ms": report.seconds * 1000,
            "timestamp": time.time(),
            "tokens_per_second": report.tokens / report.seconds if report.seconds > 0 else None,
            "learning_rate": report.lr,
            "perplexity": _exp(report.loss),
            "loss_velocity": velocity,
            "loss_acceleration": acceleration,
            "sources": {name: tokens / drawn for name, tokens in report.sources.items()} if drawn else None,
            "seq_len": report.seq_len,
            "skipped": report.skipped,
            "metrics": dict(report.metrics) or None,
            **_prediction(report),
            **_layers(report.layer_gradients),
            **_scored(val, report.loss),
            **extra,
        }

    def score_row(self, step: int, val: Score, extra: Mapping[str, Any]) -> dict[str, Any]:
        """The row of an evaluation without a step, such as the one before the first."""
        return {
            **dict.fromkeys(FIELDS),
            **self.totals,
            "step": step,
            "timestamp": time.time(),
            "was_predicted": False,
            **_scored(val, None),
            **extra,
        }

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line and hand it to the operating system. Raises ScaleError (disk full)."""
        line = json.dumps(finite(row), allow_nan=False)
        try:
            with self.path.open("a", encoding="ascii") as handle:
                handle.write(line + "\n")
        except OSError as error:
            raise ScaleError(f"{self.path}: cannot be written: {error.strerror}") from None
        self.kept.add(line.encode("ascii"))

    def settle(self) -> None:
        """Force the rows to disk: a checkpoint is about to count them. Raises ScaleError."""
        try:
            if self.path.exists():
                fsync(self.path)
        except OSError as error:
            raise ScaleError(f"{self.path}: cannot be written: {error.strerror}") from None

    def cut(self, step: int, kept: Mapping[str, Any] | None = None) -> None:
        """Remove the rows beyond `step` and a torn last line, atomically; the other lines keep their bytes.

        `kept`: what `Kept.to_json` was at that step. Then exactly these lines stay, or none if none up to `step` is there.
        Raises BrokenRows if they are not the first ones of the file (without `kept`: if a line but the last is broken),
        ScaleError if the file cannot be written.
        """
        self.kept = Kept()
        if not self.path.exists():
            return
        if step < 0:
            lines = []
        elif kept is None:
            lines = [line for line, row in _lines(self.path) if row["step"] <= step]
        else:
            lines = first_lines(self.path, step, kept)
        write_atomic(self.path, "".join(line + "\n" for line in lines))
        for line in lines:
            self.kept.add(line.encode("ascii"))

    def state_dict(self) -> dict[str, Any]:
        return {"totals": dict(self.totals), "losses": [list(x) for x in self._losses], "velocity": self._velocity}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.totals = dict(state["totals"])
        self._losses = [(step, loss) for step, loss in state["losses"]]
        self._velocity = state["velocity"]

    def _follow(self, report: StepReport) -> tuple[float | None, float | None]:
        """Take the loss into the window; velocity and acceleration after it."""
        if report.skipped is None and math.isfinite(report.loss):
            self._losses = [*self._losses, (report.step, report.loss)][-WINDOW:]
        before, self._velocity = self._velocity, slope(self._losses)
        if before is None or self._velocity is None:
            return self._velocity, None
        return self._velocity, self._velocity - before


def _prediction(report: StepReport) -> dict[str, Any]:
    """What the predictor said in this step, beside its own columns."""
    said = dict(report.prediction)
    own = {name: said.pop(name, None) for name in ("predicted_loss", "confidence", "ledger")}
    return own | {"prediction": said or None}


def slope(points: list[tuple[int, float]]) -> float | None:
    """Slope of the least-squares line through (step, loss) points; None for fewer than two."""
    if len(points) < 2:
        return None
    x, y = np.array(points, dtype=np.float64).T
    x -= x.mean()
    return float(x @ (y - y.mean()) / (x @ x))


def entropy(norms: list[float]) -> float | None:
    """Shannon entropy in nats of the norms as shares of their sum: log(n) if all alike, 0 if one holds everything."""
    total = sum(norms)
    if not math.isfinite(total) or total <= 0:
        return None
    return -sum(n / total * math.log(n / total) for n in norms if n > 0) + 0.0


def finite(value: Any) -> Any:
    """`value` with every number that JSON cannot hold (NaN, infinities) replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a metrics.jsonl, also of a run still writing. Raises ScaleError if a line but the last is broken."""
    return [row for _, row in _lines(path)]


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each whole line with its row."""
    lines = path.read_bytes().split(b"\n")
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line) if line else None
            if row is not None:
                row["step"] + 0
                found.append((line.decode("ascii"), row))
        except (ValueError, TypeError, KeyError):
            if any(lines[number:]):
                raise BrokenRows(f"{path}: line {number} is no metrics row (scale train says how to go on)") from None
    return found


def _exp(loss: float) -> float | None:
    return math.exp(loss) if loss < 700 else None


def _layers(norms: Mapping[str, float]) -> dict[str, Any]:
    """Norms by layer and what sums them up; a norm that is not finite has exploded."""
    if not norms:
        return {}
    sane = [norm for norm in norms.values() if math.isfinite(norm)]
    middle = median(sane) if sane else 0.0
    return {
        "gradient_entropy": entropy(list(norms.values())),
        "layer_gradients": dict(norms),
        "layer_gradient_max": max(sane, default=None),
        "layer_gradient_min": min(sane, default=None),
        "layer_gradient_mean": sum(sane) / len(sane) if sane else None,
        "layer_gradient_vanishing": sum(norm == 0 or norm < VANISHING * middle for norm in sane),
        "layer_gradient_exploding": len(norms) - len(sane) + sum(norm > EXPLODING * middle for norm in sane),
    }


def _scored(val: Score | None, loss: float | None) -> dict[str, Any]:
    if val is None:
        return {}
    gap = None if loss is None else val.loss - loss
    return {"val_loss": val.loss, "val_by_source": dict(val.by_source) or None, "train_val_gap": gap}
