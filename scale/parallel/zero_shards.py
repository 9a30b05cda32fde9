"""Where DeepSpeed keeps masters, gradients and moments: flat buffers per parameter group, cut over the ranks.

Stages 2 and 3 cut differently and publish differently; everything else sees only fragments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Fragment:
    """`numel` elements from `offset` of a flattened parameter; they lie in `flat` (fp32 masters, N) from `start`."""

    flat: Tensor
    start: int
    numel: int
    offset: int

    def of(self, buffer: Tensor | None) -> Tensor:
        """This fragment's part of a buffer that is laid out like `flat`."""
        assert buffer is not None
        return buffer.detach().view(-1).narrow(0, self.start, self.numel)

    @property
    def master(self) -> Tensor:
        return self.of(self.flat)


class Layout(Protocol):
    """One stage's view of DeepSpeed's optimizer."""

    zero: Any

    def fragments(self) -> dict[str, Fragment]:
        """This rank's part of every trained parameter, empty where it has none."""
        ...

    def gradients(self) -> dict[str, Tensor]:
        """Averaged fp32 gradients of these parts, as views that DeepSpeed's step reads."""
        ...

    def publish(self) -> None:
        """Copy the masters to the weights of the next forward. Collective."""
        ...

    def drop(self) -> None:
        """Forget all gradients gathered so far."""
        ...


class Stage2:
    """The parameters of a group lie one after the other in a flat buffer, which is cut into equal parts."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]):
        self.zero, self.names = zero, names

    def fragments(self) -> dict[str, Fragment]:
        out = {}
        for group, flat in zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True):
            for param in group:
                mapping, here = param._hp_mapping, Fragment(flat, 0, 0, 0)
                if mapping is not None:
                    master, within = mapping.hp_fragment_address, mapping.lp_fragment_address
                    here = Fragment(flat, master.start, master.numel, within.start)
                out[self.names[param]] = here
        return out

    def gradients(self) -> dict[str, Tensor]:
        if self.zero.cpu_offload:
            return {name: fragment.of(fragment.flat.grad) for name, fragment in self.fragments().items()}
        out = {name: fragment.master.new_empty(0) for name, fragment in self.fragments().items()}
        for i, params in enumerate(self.zero.params_in_partition):
            real = [g for g in self.zero.averaged_gradients[i] if not getattr(g, "_zero_padding", False)]
            for param, grad in zip(params, real, strict=False):  # without parameters: one buffer of zeros
                out[self.names[param]] = grad.detach().view(-1)
        return out

    def publish(self) -> None:
        self.zero.update_lp_params()

    def drop(self) -> None:
        zero = self.zero
        zero.micro_step_id = -1
        zero.zero_grad()
        zero._epilogue_ran_this_backward = False
        for i in range(len(zero.bit16_groups)):
            zero.averaged_gradients[i] = None
            zero.all_grad_tensors[i] = None
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
            for flat in zero.single_partition_of_fp32_groups:
                flat.grad.zero_()


class Stage3:
    """Every parameter is cut into equal parts (the last ones padded); a rank's parts lie one after the other."""

    def __init__(self, zero: Any, names: Mapping[Tensor, str]):
        self.zero, self.names = zero, names

    def fragments(self) -> dict[str, Fragment]:
        out = {}
        for group, flat in zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True):
            for param in group:
                _, start, size = self.zero.grad_position[self.zero.get_param_id(param)]
                offset = min(size * param.ds_zero_partition_rank, param.ds_numel)
                out[self.names[param]] = Fragment(flat, start, min(size, param.ds_numel - offset), offset)
        return out

    def gradients(self) -> dict[str, Tensor]:
        found, fragments, out = self.zero.get_fp32_grad_partitions(), self.fragments(), {}
        for i, group in enumerate(self.zero.fp16_groups):
            for k, param in enumerate(group):
                name = self.names[param]
                out[name] = found[i][k].detach().view(-1).narrow(0, 0, fragments[name].numel)
        return out

    def publish(self) -> None:
        zero = self.zero
        with torch.no_grad():
            zero._partition_all_parameters()
            for i in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(i)
            if zero.persistent_parameters:  # small ones stay whole on every rank between steps
                zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
            zero.invalidate_secondary_tensor()

    def drop(self) -> None:
        zero = self.zero
        zero.zero_grad()
        zero._offload_boundary_param_ids = set()
        zero.averaged_gradients = {}
        zero.grad_partitions_flat_buffer.zero_()  # or a parameter without a gradient keeps that of an earlier step
        if zero.offload_optimizer:
            zero.reset_cpu_buffers()
            for flat in zero.fp32_partitioned_groups_flat:
                flat.grad.zero_()
