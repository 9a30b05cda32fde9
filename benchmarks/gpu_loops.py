"""The providers of `throughput.py`: (work, scratch folder) -> losses and seconds of every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.gpu_work import GpuWork
from benchmarks.loops import MODES, Watched, huggingface, plain_loop, summed_loss
from benchmarks.work import Run
from scale.choices import choose_code, choose_strategy, decide, to_fp8
from scale.errors import OutOfMemory
from scale.hardware import choose_precision, detect
from scale.models.build import set_recompute
from scale.models.fp8 import exact_products
from scale.models.leak import refuse_leaks
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.single import Single
from scale.train.step import BackwardStepper, StepSettings

TITAN = "torchtitan_model_in_bare_loop"


def scale(work: GpuWork, folder: Path) -> Run:
    """BackwardStepper, Single and CausalLM, with every `auto` decided as `scale train` decides it."""
    stepper = scale_stepper(work)
    clock = work.clock()
    source = Watched(iter(work.groups).__next__, clock)
    return clock.run([stepper.step(source).loss for _ in work.groups])


def scale_stepper(work: GpuWork) -> BackwardStepper:
    config, hardware = work.config, detect(work.config.compute.device)
    config = config.model_copy(update={"compute": config.compute.model_copy(update={"attention": work.attention})})
    attention, kernels = choose_code(config, hardware)  # Liger's patch comes before the model
    model = work.meta()
    precision = choose_precision(config.compute.precision, hardware, config.compute.fp8.emulate)
    strategy_choice = choose_strategy(config.compute, 1)
    choices = to_fp8(config, model, decide(config, hardware, model, attention, strategy_choice, 1, kernels, precision))
    print(*(f"{name}: {choice}" for name, choice in vars(choices).items()), sep="\n")
    if choices.recompute.value != "off":
        set_recompute(model.module, int(choices.recompute.value))
    objective = CausalLM(loss=choices.loss.value, one_row=attention.value == "flash_attention_2")
    strategy = Single(work.device, choices.precision.value, choices.compile.value)
    root = strategy.prepare(Root(model.module, objective), config.optim, model.weights)
    with exact_products(model.module):
        refuse_leaks(root, work.hf_config.vocab_size)
    settings = StepSettings(config.train.steps or 0, config.optim.lr, config.schedule, clip=config.optim.clip)
    return BackwardStepper(root, objective, strategy, settings, event=_no_smaller_batches)


def _no_smaller_batches(kind: str, text: str) -> None:
    """Halving the micro-batch would make it another configuration."""
    if kind == "out_of_memory":
        raise OutOfMemory(text)


def bare(work: GpuWork, folder: Path) -> Run:
    """A hand-written loop; model and loss are compiled together."""
    return plain_loop(work, work.model(), compiled(summed_loss, work.compile))


def reference(work: GpuWork, steps: int) -> list[float]:
    """The first losses of the hand-written loop, not compiled, every layer recomputed to spare memory."""
    model = work.model()
    set_recompute(model, 1)
    return plain_loop(replace(work, groups=work.groups[:steps], warm_up=0), model, summed_loss).losses


def torchtitan(work: GpuWork, folder: Path) -> Run:
    """torchtitan's Llama with its flex attention and fused QKV; loop, optimizer, autocast and loss are the bare loop's."""
    return plain_loop(work, titan_model(work), compiled(titan_loss, work.compile))


def titan_model(work: GpuWork) -> nn.Module:
    """The same weights in torchtitan's Llama (0.3), converted by its own adapter."""
    from torchtitan.models import llama3 as titan

    c: Any = work.hf_config
    norm = titan.RMSNorm.Config(normalized_shape=c.hidden_size, eps=c.rms_norm_eps)
    theta = c.rope_parameters["rope_theta"]
    layers = titan._build_llama3_layers(
        n_layers=c.num_hidden_layers,
        dim=c.hidden_size,
        n_heads=c.num_attention_heads,
        n_kv_heads=c.num_key_value_heads,
        hidden_dim=c.intermediate_size,
        rope=titan.ComplexRoPE.Config(dim=c.head_dim, max_seq_len=work.config.data.seq_len, theta=theta),
        attn_backend="flex",
    )
    for layer in layers:
        layer.attention_norm.eps = layer.ffn_norm.eps = c.rms_norm_eps
    width, vocabulary = c.hidden_size, c.vocab_size
    config = titan.Llama3Model.Config(
        dim=width,
        vocab_size=vocabulary,
        enable_weight_tying=c.tie_word_embeddings,
        tok_embeddings=titan.Embedding.Config(num_embeddings=vocabulary, embedding_dim=width),
        norm=norm,
        lm_head=titan.Linear.Config(in_features=width, out_features=vocabulary),
        layers=layers,
    )
    with torch.device("meta"):
        model = config.build()
    model.to_empty(device=work.device)
    model.init_states(buffer_device=work.device)
    model.load_state_dict(titan.Llama3StateDictAdapter(config, None).from_hf(dict(work.model().state_dict())))
    return model.train()


def titan_loss(work: GpuWork, model: nn.Module, ids_BL: Tensor, position_BL: Tensor, targets_BL: Tensor) -> Tensor:
    """Cross-entropy of all logits in fp32; the mask of packed documents is made from positions."""
    plain: Any = model
    with torch.autocast(work.device.type, torch.bfloat16, enabled=work.precision == "bf16"):
        logits_BLV = plain(ids_BL, position_BL, plain.get_attention_masks(position_BL))
        return torch.nn.functional.cross_entropy(
            logits_BLV.float().flatten(0, 1), targets_BL.flatten(), ignore_index=-100, reduction="sum"
        )


def compiled(summed: Any, mode: str) -> Any:
    """The same function, compiled unless `mode` is off."""
    return summed if mode == "off" else torch.compile(summed, mode=MODES[mode])


PROVIDERS: dict[str, Callable[[GpuWork, Path], Run]] = {
    "scale": scale,
    "bare": bare,
    "huggingface": huggingface,
    TITAN: torchtitan,
}
