"""What must hold before a run starts. Each check raises UsageError with one line and writes nothing."""

from __future__ import annotations

from pathlib import Path

from scale.config import PretrainRun, differences
from scale.errors import UsageError
from scale.hardware import Hardware
from scale.models.hf_config import model_config
from scale.models.size import Size
from scale.parallel.footprint import footprint
from scale.parallel.ranks import Ranks


def check_same_everywhere(config: PretrainRun, ranks: Ranks) -> None:
    """Every rank must have been given the same config. Raises UsageError naming rank and keys. Collective."""
    own = config.compute.deepspeed.config
    json = Path(own).read_text(encoding="utf-8", errors="replace") if own and Path(own).is_file() else None
    content, first_json = ranks.gather([config.model_dump(mode="json"), json])[0]
    first = type(config).model_validate(content)

    def compare() -> None:
        if json != first_json:
            raise UsageError(f"compute.deepspeed.config = {own!r}: has another content here than on rank 0")
        found = differences(first, config)
        if found:
            shown = "; ".join(f"{key} = {mine!r} here, {theirs!r} on rank 0" for key, (theirs, mine) in found.items())
            raise UsageError(f"another config: {shown} (start every rank with the same file and overrides)")

    ranks.each(compare)


def check_same_device(hardware: Hardware, ranks: Ranks) -> None:
    """Decisions are rank 0's, so every rank needs a device of the same kind. Raises UsageError naming the rank. Collective."""
    first = ranks.gather([hardware.device, list(hardware.capability or ()), hardware.name])[0]

    def compare() -> None:
        if [hardware.device, list(hardware.capability or ())] != first[:2]:  # CPUs may differ in their names
            raise UsageError(
                f"compute.device: {hardware.name} ({hardware.device}) here, {first[2]} ({first[0]}) on rank 0 (is the GPU "
                "driver of this machine in order? launch/preflight.py --gpus names such machines)"
            )

    ranks.each(compare)


def check_length(config: PretrainRun) -> None:
    """A wrong model, or rows too long for it, show here, before the data are tokenised. Raises UsageError."""
    longest = getattr(model_config(config.model), "max_position_embeddings", None)
    if longest is not None and config.data.seq_len > longest:
        raise UsageError(f"data.seq_len = {config.data.seq_len}: the model's max_position_embeddings is {longest}")


def check_memory(size: Size, config: PretrainRun, strategy: str, hardware: Hardware, world_size: int) -> None:
    """Raises UsageError where even weights and gradients, as the strategy shares and offloads them, are more than a device
    has."""
    held = footprint(size, config.compute, config.optim.kind, strategy, world_size, config.compute.precision)
    need = held.weights + held.gradients
    if need > hardware.memory:
        share = "" if world_size == 1 else f" on each of {world_size} ranks"
        raise UsageError(
            f"model: the weights and gradients of {size.total:,} parameters take {need / 2**30:,.0f} GiB{share}, but "
            f"{hardware.name} has {hardware.memory / 2**30:,.0f} GiB (use {_smaller(config, strategy, hardware)})"
        )


def _smaller(config: PretrainRun, strategy: str, hardware: Hardware) -> str:
    """What would take less memory."""
    compute, ways = config.compute, ["a smaller model", "a larger device"]
    if strategy == "fsdp" and compute.fsdp.shard != "all":
        ways.insert(0, "compute.fsdp.shard=all")
    if strategy == "fsdp" and hardware.device != "cpu":
        ways.insert(0, "compute.fsdp.offload=true")
    if strategy == "deepspeed" and compute.deepspeed.stage == 2:
        ways.insert(0, "compute.deepspeed.stage=3")
    if strategy == "deepspeed" and not compute.deepspeed.offload:
        ways.insert(0, "compute.deepspeed.offload=true")
    return f"{', '.join(ways[:-1])} or {ways[-1]}"


def check_held_back(config: PretrainRun, positions: int) -> None:
    """Check batches that would take a good part of the training data (`positions` tokens) away."""
    wanted = config.predict.guard.tokens
    if config.predict.enabled and wanted > positions / 10:
        raise UsageError(
            f"predict.guard.tokens = {wanted:,}: more than a tenth of the {positions:,} training tokens would be held back"
        )
