"""Canonical state from and to DeepSpeed's flat buffers: every tensor whole on one rank, gathered one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Size, Tensor, nn

from scale.errors import ScaleError
from scale.parallel import state
from scale.parallel.ranks import Ranks
from scale.parallel.whole import holders, owners, put_together, send_around
from scale.parallel.zero_shards import Fragment

MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroState:
    """The trained parameters `shapes` (by name) of a model, whose fragments `fragments()` gives and `optimizer` steps."""

    def __init__(
        self,
        ranks: Ranks,
        model: nn.Module,
        shapes: Mapping[str, Size],
        fragments: Callable[[], dict[str, Fragment]],
        optimizer: torch.optim.Optimizer,
    ):
        self.ranks, self.model, self.shapes, self.fragments, self.optimizer = ranks, model, shapes, fragments, optimizer

    def tensors(self) -> dict[str, Tensor]:
        """Buffers and step counts on every rank; of the rest what this rank owns, on the CPU. Collective."""
        out = dict(self._buffers())
        fragments, steps = self.fragments(), self._steps()
        out |= {f"optim/{name}/step": torch.tensor(step) for name, step in steps.items()}
        owner = owners(self._large(moments=bool(steps)), self.ranks.world_size)
        for key, name, buffer in self._places(fragments, moments=bool(steps)):
            whole = self.whole(fragments[name], buffer, self.shapes[name], owner[key])
            if whole is not None:
                out[key] = whole.cpu()
        return out

    def blank(self, saved: Mapping[str, Size]) -> dict[str, Tensor]:
        """Raises ScaleError if names or shapes differ from this model's, or AdamW's moments are not all there."""
        buffers = self._buffers()
        moments = self._check(saved)
        large = self._large(moments)
        owner = owners(large, self.ranks.world_size)
        out = {key: torch.zeros(large[key]) for key in owner if owner[key] == self.ranks.rank}
        if moments:
            out |= {f"optim/{name}/step": torch.zeros(()) for name in self.shapes}
        return out | buffers

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Buffers were read in place; owners send the rest around, one tensor at a time. Collective."""
        owner = holders(self.ranks, [key for key in tensors if key.startswith(("model/", "optim/"))])
        steps = {float(value) for key, value in tensors.items() if key.endswith("/step")}
        if len(steps) > 1:
            raise ScaleError(f"checkpoint: parameters made different numbers of steps ({_few(steps)}); ZeRO counts one")
        fragments = self.fragments()
        self.optimizer.state.clear()
        if steps:
            self._new_moments(fragments, steps.pop())
        for key, name, buffer in self._places(fragments, moments=bool(self.optimizer.state)):
            mine = tensors[key] if owner[key] == self.ranks.rank else None
            whole_N, part = send_around(self.ranks, mine, self.shapes[name], owner[key]), fragments[name]
            part.of(buffer).copy_(whole_N[part.offset : part.offset + part.numel])

    def whole(self, part: Fragment, buffer: Tensor, shape: Size, owner: int | None = None) -> Tensor | None:
        """A parameter or moment put together on `owner` (None: on every rank), bit for bit. Collective."""
        return put_together(self.ranks, part.of(buffer), part.offset, shape, owner)

    def _buffers(self) -> dict[str, Tensor]:
        trained = {f"model/{name}" for name in self.shapes}
        return {key: tensor for key, tensor in state.model_tensors(self.model).items() if key not in trained}

    def _large(self, moments: bool) -> dict[str, Size]:
        keys = {f"model/{name}": shape for name, shape in self.shapes.items()}
        if moments:
            keys |= {f"optim/{name}/{moment}": shape for name, shape in self.shapes.items() for moment in MOMENTS}
        return keys

    def _places(self, fragments: Mapping[str, Fragment], moments: bool) -> Iterator[tuple[str, str, Tensor]]:
        """(key, name, flat buffer) of everything that is cut over the ranks, in the same order on each."""
        for name in self.shapes:
            flat = fragments[name].flat
            yield f"model/{name}", name, flat
            if moments:
                for moment in MOMENTS:
                    yield f"optim/{name}/{moment}", name, self.optimizer.state[flat][moment]

    def _steps(self) -> dict[str, float]:
        """Steps made, by parameter; empty before the first one."""
        if not self.optimizer.state:
            return {}
        return {name: float(self.optimizer.state[part.flat]["step"]) for name, part in self.fragments().items()}

    def _new_moments(self, fragments: Mapping[str, Fragment], step: float) -> None:
        for part in fragments.values():
            flat = part.flat
            if flat not in self.optimizer.state:
                self.optimizer.state[flat] = {"step": torch.tensor(step, device=flat.device)} | {
                    moment: torch.zeros_like(flat, requires_grad=False) for moment in MOMENTS
                }

    def _check(self, saved: Mapping[str, Size]) -> bool:
        """Whether the state holds moments."""
        ours = {f"model/{name}": shape for name, shape in self.shapes.items()}
        state.check(ours | {key: tensor.shape for key, tensor in self._buffers().items()}, saved)
        moments = {key: tuple(shape) for key, shape in saved.items() if key.startswith("optim/")}
        expected = {key: tuple(shape) for key, shape in self._large(True).items() if key.startswith("optim/")}
        expected |= {f"optim/{name}/step": () for name in self.shapes}
        if moments:
            for key in sorted(moments.keys() ^ expected.keys()):
                what = "lacks" if key in expected else "holds, beside AdamW's moments of what is trained here,"
                raise ScaleError(f"the checkpoint {what} {key}")
            for key, shape in expected.items():
                if moments[key] != shape:
                    raise ScaleError(f"{key}: checkpoint {moments[key]}, model {shape}")
        return bool(moments)


def _few(values: set[float]) -> str:
    return ", ".join(f"{value:g}" for value in sorted(values)[:4])
