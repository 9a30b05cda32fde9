"""The canonical state of a model and its optimizer, for strategies whose tensors are the model's own (or DTensors)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from torch import Size, Tensor, nn

from scale.errors import ScaleError
from scale.parallel.optimizer import OptimizerSet

T = TypeVar("T")


def canonical(model: nn.Module, optimizer: OptimizerSet) -> dict[str, Tensor]:
    """`model/NAME` and `optim/NAME/MOMENT`; the model's tensors are its own, not copies."""
    return model_tensors(model) | {f"optim/{key}": moment for key, moment in optimizer.moments().items()}


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes: trainable parameters and persistent buffers. A frozen base comes from where it came."""
    frozen = {id(p) for p in model.parameters() if not p.requires_grad}
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in frozen and id(tensor) not in seen:  # tied weights once
            kept[f"model/{name}"] = tensor.detach()
        seen.add(id(tensor))
    return kept


def blank(model: nn.Module, optimizer: OptimizerSet, saved: Mapping[str, Size]) -> dict[str, Tensor]:
    """The model's own tensors and new ones for the moments. Raises ScaleError if they do not fit names and shapes."""
    ours = model_tensors(model)
    check({name: tensor.shape for name, tensor in ours.items()}, saved)
    return ours | {f"optim/{key}": tensor for key, tensor in optimizer.blank(moments(saved)).items()}


def check(ours: Mapping[str, Size], saved: Mapping[str, Size]) -> None:
    """Raises ScaleError for the first `model/NAME` that only one side has or that differs in shape."""
    for name in sorted({n for n in saved if n.startswith("model/")} ^ ours.keys()):
        where = "the checkpoint" if name in saved else "the model"
        raise ScaleError(f"checkpoint and model differ: only {where} has {name.removeprefix('model/')}")
    for name, shape in ours.items():
        if tuple(saved[name]) != tuple(shape):
            raise ScaleError(f"{name.removeprefix('model/')}: checkpoint {tuple(saved[name])}, model {tuple(shape)}")


def moments(state: Mapping[str, T]) -> dict[str, T]:
    """`optim/NAME/MOMENT` -> `NAME/MOMENT`."""
    return {key.removeprefix("optim/"): value for key, value in state.items() if key.startswith("optim/")}
