"""The moments of training that the world model learns from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from scale.predict.features import NAMES
from scale.predict.moments import Moment
from scale.predict.packing import pack_array, unpack_array
from scale.predict.world.rssm import ACTIONS, CARRIES

F = len(NAMES)
WIDTH = F + ACTIONS + 3 + CARRIES
RECENT = 2
"""Windows are drawn at age u ** RECENT, u uniform: half of them from the newest quarter, because training changes."""
FURTHEST = 10.0
"""Targets are cut off here, so that a spike does not drown everything else."""


@dataclass(frozen=True)
class Batch:
    """Moments as tensors; nan where something is unknown. Leading dimensions as the rows had."""

    features: Tensor
    actions: Tensor
    loss: Tensor
    """(loss - baseline) / noise."""
    grad: Tensor
    """log(gradient norm / its baseline)."""
    diverged: Tensor
    carry: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> Batch:
        features, actions, numbers, carry = rows.split((F, ACTIONS, 3, CARRIES), -1)
        loss, grad, diverged = numbers.unbind(-1)
        return cls(features, actions, loss, grad, diverged, carry)


def row(moment: Moment) -> np.ndarray:
    """A moment as fp32 numbers, targets in their own units."""
    loss = (moment.loss - moment.baseline) / moment.noise
    grad = math.log(moment.grad_norm / moment.grad_baseline) if moment.grad_norm > 0 else math.nan
    carry = [math.nan] * CARRIES if moment.carry_G is None else moment.carry_G[:CARRIES]
    targets = np.array([loss, grad, float(moment.diverged), *carry])
    targets = np.where(np.isfinite(targets), np.clip(targets, -FURTHEST, FURTHEST), math.nan)
    return np.concatenate([moment.features_F, moment.action_A, targets]).astype(np.float32)


class Replay:
    """Ring buffer of moments. A window never crosses a place where training went back. Steps that were counted without being
    made are no gap: what led to the next moment is its action."""

    def __init__(self, capacity: int):
        self.rows_NW = np.zeros((capacity, WIDTH), np.float32)
        self.breaks_N = np.zeros(capacity, bool)
        """Moments that do not follow from the one before them."""
        self.added = 0
        self.last_step: int | None = None

    def __len__(self) -> int:
        return min(self.added, len(self.rows_NW))

    def add(self, moment: Moment) -> None:
        """The newest moment; the oldest one goes when the buffer is full."""
        place = self.added % len(self.rows_NW)
        self.rows_NW[place] = row(moment)
        self.breaks_N[place] = self.last_step is None or moment.step <= self.last_step
        self.last_step = moment.step
        self.added += 1

    def cut(self) -> None:
        """What comes next does not follow from what is here."""
        self.last_step = None

    def newest(self, length: int) -> Tensor:
        """Up to `length` last moments that follow each other: (L, W). Raises ValueError if there are none."""
        if not self.added:
            raise ValueError("replay: nothing was observed yet")
        places = self._places()[-length:]
        broken = np.flatnonzero(self.breaks_N[places])
        return torch.from_numpy(self.rows_NW[places[broken[-1] :] if len(broken) else places])

    def starts(self, length: int) -> np.ndarray:
        """Ages (0 is the oldest) at which a window of `length` moments may start."""
        breaks = np.cumsum(self.breaks_N[self._places()])
        return np.flatnonzero(breaks[length - 1 :] == breaks[: len(breaks) - length + 1])

    def windows(self, shape: tuple[int, int], length: int, generator: torch.Generator) -> Tensor | None:
        """Windows of consecutive moments (*shape, L, W), each drawn on its own; None where there are none so long."""
        starts = self.starts(length) if len(self) >= length else np.zeros(0, int)
        if not len(starts):
            return None
        share = torch.rand(shape, generator=generator, dtype=torch.float64).numpy()
        drawn = starts[len(starts) - 1 - (len(starts) * share**RECENT).astype(int)]
        places = self._places()[drawn[..., None] + np.arange(length)]
        return torch.from_numpy(self.rows_NW[places])

    def _places(self) -> np.ndarray:
        return (np.arange(len(self)) + self.added - len(self)) % len(self.rows_NW)

    def state_dict(self) -> dict[str, Any]:
        """JSON, with what is filled alone."""
        n = len(self)
        return {
            "rows": pack_array(self.rows_NW[:n]),
            "breaks": pack_array(self.breaks_N[:n]),
            "added": self.added,
            "last_step": self.last_step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same capacity. Raises ValueError if it does not fit."""
        rows, n = unpack_array(state["rows"]), min(state["added"], len(self.rows_NW))
        if rows.shape != (n, WIDTH):
            raise ValueError(f"replay of {len(self.rows_NW)} moments: saved were {rows.shape}, expected {(n, WIDTH)}")
        self.rows_NW[:n] = rows
        self.breaks_N[:n] = unpack_array(state["breaks"])
        self.added, self.last_step = state["added"], state["last_step"]
