"""Optimizers from torch and bitsandbytes behind one face, with moments readable as plain fp32 tensors per parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Size, Tensor, nn

from scale.config.optim import OptimConfig
from scale.errors import MissingExtra, ScaleError, UsageError
from scale.models.roles import MATRICES, roles_of
from scale.parallel.muon import muon_class

_EIGHT_BIT = {"exp_avg": "1", "exp_avg_sq": "2"}
"""Suffix of bitsandbytes' state1/absmax1/qmap1 and state2/... for each moment."""
_BLOCK = 256
"""Elements that share one scale in bitsandbytes' blockwise 8-bit optimizers."""


class OptimizerSet:
    """One or two torch optimizers that together hold every trainable parameter of a model once."""

    def __init__(self, model: nn.Module, config: OptimConfig):
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        self.optimizers = _build(model, self.names, config)
        for group in self.groups():
            group["peak_lr"] = group["lr"]

    def groups(self) -> list[dict[str, Any]]:
        """Parameter groups of all optimizers."""
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def step(self, lr_factor: float) -> None:
        """Step every optimizer at its peak learning rate times `lr_factor`."""
        for group in self.groups():
            group["lr"] = group["peak_lr"] * lr_factor
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def moments(self) -> dict[str, Tensor]:
        """`NAME/MOMENT` -> fp32 tensor; step counts are 0-dim. 8-bit moments are dequantised and come with their scales,
        so that they can be quantised again without loss."""
        out: dict[str, Tensor] = {}
        for optimizer in self.optimizers:
            for param, state in optimizer.state.items():
                for key, value in _canonical(state).items():
                    out[f"{self.names[param]}/{key}"] = value
        return out

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        """fp32 tensors to read the saved moments into, sharded like their parameters. Raises ScaleError for a parameter that
        is not trained here, or by another optimizer."""
        params = {name: p for p, name in self.names.items()}
        muon = {self.names[p] for o in self.optimizers if isinstance(o, torch.optim.Muon) for p in _held(o)}
        out = {}
        for key, shape in saved.items():
            name, _, moment = key.rpartition("/")
            if name not in params:
                raise ScaleError(f"checkpoint holds optimizer moments of {name!r}, which this run does not train")
            if (moment == "momentum_buffer") != (name in muon):
                raise ScaleError(
                    f"checkpoint holds {moment} of {name!r}, which {'Muon' if name in muon else 'AdamW'} trains here: go on "
                    "with the version of Scale and the optim.kind that wrote it, or start under another name from its export"
                )
            param = params[name].detach()
            if tuple(shape) == tuple(param.shape):
                out[key] = torch.zeros_like(param, dtype=torch.float32)
            else:  # step counts, scales
                out[key] = torch.zeros(shape, dtype=torch.float32, device=param.device)
        return out

    def restore(self, moments: Mapping[str, Tensor]) -> None:
        """Take over canonical moments."""
        by_param: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, moment = key.rpartition("/")
            by_param.setdefault(name, {})[moment] = value
        for optimizer in self.optimizers:
            optimizer.state.clear()
            for group in optimizer.param_groups:
                for param in group["params"]:
                    if self.names[param] in by_param:
                        _set_state(optimizer, group, param, by_param[self.names[param]])


def _held(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def adamw_groups(model: nn.Module, config: OptimConfig) -> list[dict[str, Any]]:
    """Parameter groups for AdamW. Raises ScaleError if nothing is trained."""
    return _groups(*_split(model), config)


def _split(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Trained parameters that are decayed (matrices, by their role) and those that are not."""
    roles = roles_of(model)
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not trained:
        raise ScaleError("nothing to train: no parameter of the model requires a gradient")
    decayed = [p for p in trained if roles[p] in MATRICES]
    return decayed, [p for p in trained if roles[p] not in MATRICES]


def _build(model: nn.Module, names: Mapping[Tensor, str], config: OptimConfig) -> list[torch.optim.Optimizer]:
    decayed, plain = _split(model)
    roles = roles_of(model)
    device = next(iter(names)).device.type
    common: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
    fused = device in ("cuda", "cpu")
    if config.kind == "muon":
        matrices = [p for p in decayed if roles[p] == "matrix"]
        if not matrices:
            raise UsageError("optim.kind = 'muon': the model has no matrix for it to train (use adamw)")
        rest = [p for p in decayed if roles[p] != "matrix"]
        muon = muon_class(matrices)(
            matrices,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            adjust_lr_fn="match_rms_adamw",  # one learning rate for both optimizers (arXiv 2502.16982)
        )
        others = _groups(rest, plain, config)
        return [muon, *([torch.optim.AdamW(others, fused=fused, **common)] if others else [])]
    if config.kind == "adamw8bit":
        try:
            import bitsandbytes
        except ImportError:
            raise MissingExtra("optim.kind = 'adamw8bit'", "quant") from None
        return [bitsandbytes.optim.AdamW8bit(_groups(decayed, plain, config), **common)]
    return [torch.optim.AdamW(_groups(decayed, plain, config), fused=fused, **common)]


def _groups(decayed: list[Tensor], plain: list[Tensor], config: OptimConfig) -> list[dict[str, Any]]:
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _canonical(state: Mapping[str, Any]) -> dict[str, Tensor]:
    if "state1" not in state:
        return {key: value.detach().float() for key, value in state.items() if isinstance(value, Tensor)}
    out = {"step": torch.tensor(float(state["step"]))}
    for moment, i in _EIGHT_BIT.items():
        value = state[f"state{i}"]
        if value.dtype == torch.uint8:
            scale = state[f"absmax{i}"]
            out[f"{moment}_scale"] = scale.clone()
            value = state[f"qmap{i}"][value.long()] * _per_element(scale, value)
        out[moment] = value.detach().float()
    return out


def _set_state(optimizer: Any, group: dict[str, Any], param: Tensor, moments: dict[str, Tensor]) -> None:
    state = optimizer.state[param]
    if not hasattr(optimizer, "init_state"):  # a torch optimizer
        state.update({key: value for key, value in moments.items() if not key.endswith("_scale")})
        return
    at = next((g, i) for g, grp in enumerate(optimizer.param_groups) for i, p in enumerate(grp["params"]) if p is param)
    optimizer.init_state(group, param, *at)  # bitsandbytes decides here which parameters are quantised
    state["step"] = int(moments["step"])
    for moment, i in _EIGHT_BIT.items():
        value, target = moments[moment], state[f"state{i}"]
        if target.dtype != torch.uint8:
            target.copy_(value)
            continue
        scale = moments.get(f"{moment}_scale")
        if scale is None:  # moments of another optimizer
            blocks = torch.nn.functional.pad(value.flatten(), (0, -value.numel() % _BLOCK)).view(-1, _BLOCK)
            scale = blocks.abs().amax(1)
        state[f"absmax{i}"].copy_(scale)
        target.copy_(_nearest(state[f"qmap{i}"], value / _per_element(scale, value).clamp(min=1e-38)))


def _per_element(scale: Tensor, like: Tensor) -> Tensor:
    """One scale per block of the flattened parameter -> one per element."""
    return scale.repeat_interleave(_BLOCK)[: like.numel()].view_as(like)


def _nearest(code: Tensor, value: Tensor) -> Tensor:
    """Index of the nearest entry of the sorted table. Exact for values that came out of the table, unlike quantising
    anew: a table that reaches +1 but not -1 finds another scale for a block whose largest value is negative."""
    return torch.bucketize(value, (code[1:] + code[:-1]) / 2).to(torch.uint8)
