"""Canonical state between DeepSpeed runs and one process, for test_zero.py."""

from __future__ import annotations

from pathlib import Path

import torch

from scale.config.run import DeepSpeedConfig
from scale.errors import ScaleError
from scale.parallel.single import Single
from scale.parallel.zero import DeepSpeed
from tests.parallel.lm import timeouts
from tests.parallel.zero_parts import Rows, bf16_beside_fsdp, edit, params, refuse_step, rows, run, same, stepper, train


def filled(strategy, state):
    """Restore a canonical state (name -> whole tensor) as a checkpoint does."""
    blank = strategy.blank({name: tensor.shape for name, tensor in state.items()})
    with torch.no_grad():
        for name, tensor in blank.items():
            tensor.copy_(state[name])
    strategy.restore(blank)
    return sorted(blank)


def collected(strategy, ranks, folder, tag):
    """The canonical state of all ranks put together, and who owns what."""
    mine = strategy.tensors()
    torch.save({name: tensor.clone() for name, tensor in mine.items()}, Path(folder, f"{tag}{ranks.rank}.pt"))
    owned = ranks.gather({name: tensor.numel() for name, tensor in mine.items()})
    state = {}
    for rank in range(ranks.world_size):
        state |= torch.load(Path(folder, f"{tag}{rank}.pt"))
    return state, owned


def saved(strategy, ranks, folder):
    fresh = lambda: stepper(DeepSpeed(ranks, strategy.config))  # noqa: E731
    made = stepper(strategy)
    empty, _ = collected(strategy, ranks, folder, "empty")
    again = fresh()
    filled(again.strategy, empty)
    from_start = [run(made, rows(ranks), 3), run(again, rows(ranks), 3)]
    state, owned = collected(strategy, ranks, folder, "state")
    other = fresh()
    blank = filled(other.strategy, state)
    other.steps_done = 3
    goes_on = [run(made, rows(ranks, 3), 3), run(other, rows(ranks, 3), 3)]
    single, into = stepper(Single()), stepper(Single())
    run(single, Rows(), 3)
    from_single = {name: tensor.clone() for name, tensor in single.strategy.tensors().items()}
    filled(into.strategy, state)
    out_of = fresh()
    filled(out_of.strategy, from_single)
    into.steps_done = out_of.steps_done = 3
    return {
        "from_start": from_start,
        "goes_on": goes_on,
        "same_end": same(params(strategy), params(other.strategy)),
        "names": [sorted(state), sorted(from_single)],
        "dtypes": sorted({str(t.dtype) for t in state.values()}),
        "owned": owned,
        "blank": blank,
        "single": run(single, Rows(drawn=3), 3),
        "into_single": run(into, Rows(drawn=3), 3),
        "from_single": run(out_of, rows(ranks, 3), 3),
        "refused": refused(out_of.strategy, state),
    }


def alone(ranks, stage, folder):
    """One process goes on where two stopped."""
    made = stepper(DeepSpeed(ranks, DeepSpeedConfig(stage=stage)))
    filled(made.strategy, torch.load(Path(folder, "state0.pt")) | torch.load(Path(folder, "state1.pt")))
    made.steps_done = 3
    return run(made, rows(ranks, 3), 3)


def refused(strategy, state):
    """What is said about states that do not fit."""
    name = "model.norm.weight"
    step = f"optim/{name}/step"
    said = []
    for wrong in (
        {key: tensor for key, tensor in state.items() if key != f"model/{name}"},
        state | {f"model/{name}": torch.zeros(2, 2)},
        {key: tensor for key, tensor in state.items() if key != f"optim/{name}/exp_avg"},
        state | {f"optim/{name}/momentum_buffer": torch.zeros(13)},
        state | {step: state[step] + 1},
    ):
        try:
            filled(strategy, wrong)
        except ScaleError as error:
            said.append(str(error))
    return said


def core(ranks, stage, folder):
    """Both stages as they are used."""
    make = lambda: DeepSpeed(ranks, DeepSpeedConfig(stage=stage))  # noqa: E731
    return {
        "train": train(make(), ranks),
        "edit": edit(make(), ranks),
        "refuse": refuse_step(make(), ranks),
        "saved": saved(make(), ranks, folder),
        "bf16": bf16_beside_fsdp(ranks, stage),
        "timeouts": timeouts(ranks),
    }
