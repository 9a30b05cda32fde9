"""Config -> objects. The only place that knows all rooms; plain dicts from name to class, no registries."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from scale.checks import (
    check_held_back,
    check_length,
    check_memory,
    check_same_device,
    check_same_everywhere,
)
from scale.choices import (
    Choices,
    Model,
    choose_code,
    choose_strategy,
    decide,
    measured_precision,
    settled,
    to_fp8,
)
from scale.config import PretrainRun, to_yaml
from scale.config.model import ModelConfig
from scale.config.rows import check_rows
from scale.config.run import ComputeConfig
from scale.data.curriculum import seq_len_schedule
from scale.data.planner import Planner
from scale.data.prepare import Prepared, prepare
from scale.data.rows import RowReader
from scale.data.selection import Selector
from scale.data.source import PackedSource
from scale.errors import UsageError
from scale.evaluate.held_out import HeldOut
from scale.facts import gather_facts, shown_passes
from scale.hardware import Choice, Hardware, detect
from scale.models.adapters import add_adapter
from scale.models.build import build_model, set_recompute
from scale.models.fp8 import exact_products
from scale.models.generation import SETTINGS, base_settings
from scale.models.hf_config import model_config
from scale.models.leak import refuse_leaks
from scale.models.size import flops_per_token, model_size
from scale.models.stored import stored_dtype
from scale.monitor.progress import Progress
from scale.monitor.run_folder import RunFolder
from scale.monitor.trackers import TensorBoard, Wandb
from scale.objectives.causal_lm import CausalLM
from scale.objectives.router import router_loss
from scale.parallel.ranks import Ranks, join
from scale.parallel.single import Single
from scale.predict.selection.probe import ForwardProbe
from scale.predict.selection.selector import make_selector
from scale.predict.stepper import PredictiveStepper
from scale.protocols import Monitor, Stepper, Strategy
from scale.same_run import check_same_run
from scale.train.facts import BatchShape, total_steps
from scale.train.step import BackwardStepper
from scale.trainer import Trainer


def _single(ranks: Ranks, compute: ComputeConfig, precision: str, compile: str) -> Strategy:
    return Single(ranks.device, precision, compile)


def _fsdp(ranks: Ranks, compute: ComputeConfig, precision: str, compile: str) -> Strategy:
    from scale.parallel.fsdp import Fsdp

    return Fsdp(ranks, compute.fsdp, precision, compile)


def _deepspeed(ranks: Ranks, compute: ComputeConfig, precision: str, compile: str) -> Strategy:
    from scale.parallel.zero import DeepSpeed

    return DeepSpeed(ranks, compute.deepspeed, precision)


STRATEGIES = {"single": _single, "fsdp": _fsdp, "deepspeed": _deepspeed}


def _choices(
    config: PretrainRun,
    ranks: Ranks,
    hardware: Hardware,
    model: Model,
    attention: Choice,
    strategy: Choice,
    kernels: Choice,
) -> Choices:
    """What rank 0 decides, for all; FP8 and recomputing are put into the model."""

    def decided() -> dict[str, Any]:
        precision = measured_precision(config, hardware, model, strategy)
        return asdict(decide(config, hardware, model, attention, strategy, ranks.world_size, kernels, precision))

    made = ranks.lead(decided)
    choices = Choices(**{name: Choice(**choice) for name, choice in made.items()})
    choices = ranks.each(lambda: to_fp8(config, model, choices))
    if choices.recompute.value != "off":
        ranks.each(lambda: set_recompute(model.module, int(choices.recompute.value)))
    return choices


def build_trainer(
    config: PretrainRun,
    allow: Sequence[str] = (),
    ranks: Ranks | None = None,
    split: int = 1,
    around: Callable[[BackwardStepper], Stepper] | None = None,
) -> Trainer:
    """Everything a run needs. Raises UsageError before anything is written into the run folder.

    Without `ranks` it joins those that a launcher started, as the environment says. Every rank calls it; decisions are
    rank 0's. `split` makes micro-batches smaller by this factor. `around`: a stepper of your own around the backward one,
    in place of the predictive one.
    """
    ranks = ranks or join()
    check_same_everywhere(config, ranks)
    ranks.lead(lambda: check_same_run(config, allow))
    monitors = make_monitors(config) if ranks.rank == 0 else []
    hardware = ranks.each(lambda: detect(config.compute.device))
    check_same_device(hardware, ranks)
    ranks.each(lambda: ranks.place(hardware.device))
    if config.compute.threads:
        torch.set_num_threads(config.compute.threads)
    ranks.each(lambda: check_length(config))
    attention, kernels = ranks.each(lambda: choose_code(config, hardware))
    ranks.each(lambda: check_rows(config, ranks.world_size))
    strategy_choice = ranks.each(lambda: choose_strategy(config.compute, ranks.world_size))
    prepared = prepare_together(config, ranks)
    model = ranks.each(lambda: make_model(config, prepared, attention.value, lazy=ranks.world_size > 1))
    size = model_size(model.module)
    ranks.each(lambda: check_memory(size, config, strategy_choice.value, hardware, ranks.world_size))

    choices = _choices(config, ranks, hardware, model, attention, strategy_choice, kernels)
    shape = BatchShape(config.rows_per_step, int(choices.micro_rows.value), ranks.world_size)
    planner = make_planner(config, prepared, steps=1)
    weights = mix(config, prepared)
    fill = planner.fill()
    positions = sum(order.positions for order in planner.orders)
    steps = total_steps(config, positions, fill)
    ranks.each(lambda: check_held_back(config, positions))
    flops = partial(flops_per_token, size, model.config)
    make = STRATEGIES[choices.strategy.value]
    strategy = ranks.each(lambda: make(ranks, config.compute, choices.precision.value, choices.compile.value))
    chosen = config.predict.selection
    selector = ranks.each(lambda: make_selector(chosen, planner.documents, config.data.workers, ranks))
    router = ranks.each(lambda: router_loss(model.module))
    objective = CausalLM(
        per_document=selector is not None,
        loss=choices.loss.value,
        one_row=choices.attention.value == "flash_attention_2",
        router=router,
    )
    trainer = Trainer(
        model.module,
        ranks.each(lambda: make_source(config, prepared, shape, steps, ranks, selector)),
        objective,
        folder=Path(config.runs_dir) / config.name,
        steps=steps,
        seed=config.seed,
        optim=config.optim,
        schedule=config.schedule,
        spike=config.train.spike,
        checkpoint=config.checkpoint,
        strategy=strategy,
        weights=model.weights,
        judge=(lambda root: make_judge(config, root, objective, strategy, prepared, shape))
        if any(documents.tokens for documents in prepared.valid)
        else None,
        eval_every=config.eval.every,
        early_stop=config.eval.early_stop,
        monitors=monitors,
        layer_gradients=config.monitor.layer_gradients,
        profile=config.profile,
        facts=gather_facts(config, hardware, choices, prepared, model, shape, steps, fill, flops, weights),
        flops_per_token=lambda seq_len: flops(seq_len or config.data.seq_len),
        peak_flops=float(choices.peak_flops.value) * ranks.world_size,
        config_text=to_yaml(config),
        assets=lambda path: save_assets(path, config.model, model, prepared),
        settled=settled(config, choices, ranks.world_size),
        split=split,
        timeout=config.compute.timeout,
        around=around or make_predictor(config),
    )
    if config.train.epochs is not None and len(weights) > 1 and not config.mixed_by_size:
        seen = shown_passes(config, prepared, weights, steps, fill)
        trainer.recorder.event(
            "epochs",
            f"train.epochs = {config.train.epochs:g}: the tokens of all sources are shared by weight, passes are: {seen} "
            "(without any weight each source is seen as often)",
        )
    if selector is not None and chosen.probe:
        reader = RowReader(prepared.train)
        selector.probe = ForwardProbe(trainer.root, strategy, reader, config.data.seq_len, shape.micro_rows)
    if not config.data.cross_documents:
        with exact_products(model.module):
            refuse_leaks(trainer.unwrapped, model.config.vocab_size, trainer.root)
    return trainer


def prepare_together(config: PretrainRun, ranks: Ranks) -> Prepared:
    """Tokenised data: rank 0 makes them, the others open what it made."""

    made: list[Prepared] = []
    ranks.lead(lambda: made.append(prepare(config.data, progress=config.monitor.progress)))
    return ranks.each(lambda: made[0] if made else prepare(config.data, progress=False))


def make_model(config: PretrainRun, prepared: Prepared, attention: str, lazy: bool = False) -> Model:
    """The model of a config, checked against its data."""
    vocabulary = len(prepared.tokenizer) if prepared.tokenizer is not None else None
    max_id = max(documents.max_id for documents in (*prepared.train, *prepared.valid))
    hf_config = model_config(config.model, max(vocabulary or 0, max_id + 1))
    if max(max_id + 1, vocabulary or 0) > hf_config.vocab_size:
        raise UsageError(
            f"model: its vocabulary has {hf_config.vocab_size} entries, but the data go up to id {max_id} and the "
            f"tokenizer has {vocabulary or 'no'} entries (use model.overrides.vocab_size or another tokenizer)"
        )
    module, weights = build_model(config.model, hf_config, attention, config.seed, lazy and config.adapter is None)
    if config.adapter is not None:
        module = add_adapter(module, config.adapter, config.seed)
    return Model(module, weights, hf_config)


def mix(config: PretrainRun, prepared: Prepared) -> list[float]:
    """Weights of the sources: the given ones, or their sizes."""
    return [float(n) for n in prepared.positions()] if config.mixed_by_size else prepared.weights


def make_planner(config: PretrainRun, prepared: Prepared, steps: int) -> Planner:
    """Which documents go into which step of a run of this length."""
    data = config.data
    return Planner(
        [documents.lengths for documents in prepared.train],
        mix(config, prepared),
        config.tokens_per_step,
        seq_len_schedule(data, steps),
        data.seq_len,
        data.packing,
        config.seed,
    )


def make_source(
    config: PretrainRun,
    prepared: Prepared,
    shape: BatchShape,
    steps: int,
    ranks: Ranks,
    selector: Selector | None = None,
) -> PackedSource:
    """The stream of this rank's training batches."""
    data = config.data
    planner = make_planner(config, prepared, steps)
    planner.selector = selector
    return PackedSource(
        planner,
        RowReader(prepared.train, data.cross_documents),
        prepared.names,
        micro_tokens=shape.micro_rows * data.seq_len,
        seq_lens=[lesson.seq_len for lesson in data.curriculum] + [data.seq_len],
        rank=ranks.rank,
        world_size=ranks.world_size,
        workers=data.workers,
        fingerprint=prepared.fingerprint(),
        all_sum=ranks.all_sum,
    )


def make_predictor(config: PretrainRun) -> Callable[[BackwardStepper], Stepper] | None:
    """The predictive stepper, where it is wanted."""
    return (lambda full: PredictiveStepper(full, config.predict)) if config.predict.enabled else None


def make_judge(
    config: PretrainRun,
    root: nn.Module,
    objective: CausalLM,
    strategy: Strategy,
    prepared: Prepared,
    shape: BatchShape,
) -> HeldOut:
    """Held-out loss on the documents kept back from every source."""
    return HeldOut(
        root,
        strategy,
        prepared.valid,
        prepared.names,
        mix(config, prepared),
        config.eval.tokens,
        config.data.seq_len,
        shape.micro_rows,
        config.data.cross_documents,
    )


def make_monitors(config: PretrainRun) -> list[Monitor]:
    """What watches the run beside its own records."""
    folder = RunFolder(Path(config.runs_dir) / config.name)
    monitors: list[Monitor] = [Progress()] if config.monitor.progress else []
    if config.monitor.tensorboard:
        monitors.append(TensorBoard(folder.path / "tensorboard"))
    if config.monitor.wandb is not None:
        monitors.append(Wandb(config.monitor.wandb, config.name, folder.path / "wandb"))
    return monitors


def save_assets(path: Path, config: ModelConfig, model: Model, prepared: Prepared) -> None:
    """What turns a checkpoint into a model again without the training data or the base model: architecture, the dtype
    that the base was stored in, its generation settings, and the tokenizer."""
    pretrained = config.path is not None and config.init != "random"
    described = copy.deepcopy(model.config)
    described.dtype = stored_dtype(str(config.path)) if pretrained else torch.float32
    described.save_pretrained(path)
    if settings := base_settings(config):
        (path / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(path)
