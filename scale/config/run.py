"""The root of a config file: one stage of training, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, field_validator, model_validator

from scale.config.base import NUMBER, Count, Name, NonNegative, Strict
from scale.config.data import DataConfig
from scale.config.model import AdapterConfig, ModelConfig
from scale.config.optim import BatchConfig, OptimConfig, ScheduleConfig, TrainConfig
from scale.config.predict import PredictConfig

LARGEST_STEP = 2**30
"""Tokens in one step; the rows of a step are planned in memory."""


class FsdpConfig(Strict):
    """FSDP2: weights, gradients and moments are sharded over the ranks. Read by strategy fsdp only, and refused beside another
    strategy that is named."""

    shard: Literal["all"] | Count = "all"
    """Ranks that share one copy of the model. Fewer than all: the copies are kept equal by all-reduce (HSDP); usually the
    GPUs of one node. Refused where `strategy: auto` is single."""
    reshard: bool = True
    """Free gathered weights after the forward pass and gather them again for the backward pass (as ZeRO-3); false keeps
    them in between (as ZeRO-2): faster, more memory. Not read where `strategy: auto` is single."""
    reduce: Literal["micro", "step"] = "micro"
    """When gradients are exchanged. micro: after every micro-batch, gradients stay sharded; step: once, which holds whole
    gradients on every rank. Not read where `strategy: auto` is single."""
    offload: bool = False
    """Keep shards in CPU memory. Refused where `strategy: auto` is single."""


class DeepSpeedConfig(Strict):
    """DeepSpeed ZeRO. Its JSON is generated from this file. Read by strategy deepspeed only, which `auto` never is, and refused
    beside another strategy that is named."""

    stage: Literal[2, 3] = 3
    """2: gradients and moments are sharded; 3: weights too. Not read with `strategy: auto`."""
    offload: bool = False
    """Keep gradients, masters and moments in CPU memory. Refused with `strategy: auto`."""
    config: str | None = None
    """A DeepSpeed JSON file of your own, for what is not an option here. Whatever contradicts this file is refused. So
    is the key with `strategy: auto`."""


class Fp8Config(Strict):
    """Matrix products in 8-bit floating point (precision: fp8). Small and odd matrices stay in bf16 and are listed."""

    backend: Literal["auto", "torchao", "te"] = "auto"
    """torchao or Transformer Engine; auto: torchao if it is installed."""
    recipe: Literal["tensorwise", "rowwise"] = "tensorwise"
    """One scale for each tensor (fastest) or each row (more exact)."""
    smallest: Count = 1024
    """Matrices with a side shorter than this stay in bf16: they would be slower in FP8."""
    emulate: bool = False
    """Compute FP8 rounding in bf16/fp32, on any device: for tests, never faster."""


class ComputeConfig(Strict):
    """How to compute. `auto` is decided from the hardware and printed with its reason."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """auto: cuda if there is one, then mps, else cpu."""
    strategy: Literal["auto", "single", "fsdp", "deepspeed"] = "auto"
    """Where the weights live. auto: fsdp where several processes were started, else single (one device)."""
    fsdp: FsdpConfig = FsdpConfig()
    deepspeed: DeepSpeedConfig = DeepSpeedConfig()
    precision: Literal["auto", "fp32", "bf16", "fp8"] = "auto"
    """bf16: around fp32 master weights. fp8: large matrix products in FP8, the rest in bf16. auto: fp8 where it was measured
    faster on this model's matrices, else bf16 where the device computes it natively, else fp32."""
    fp8: Fp8Config = Fp8Config()
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """torch.compile of the model; max-autotune leaves CUDA graphs out (row lengths change). Not under deepspeed."""
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """Attention implementation of the Hugging Face model. auto: by device, model and mask."""
    kernels: Literal["auto", "off", "liger"] = "auto"
    """Fused kernels inside the model. auto: liger on a CUDA device where it is installed and knows the model."""
    loss: Literal["auto", "full", "chunked", "cce"] = "auto"
    """How the loss meets the vocabulary. full: all logits at once; chunked: a few rows of logits at a time, recomputed in
    the backward pass; cce: Cut-Cross-Entropy's kernel. auto: chunked where all logits would take over 1 GiB."""
    recompute: Literal["auto", "off"] | Count = "auto"
    """Activation checkpointing: recompute every k-th layer in the backward pass (1: all). auto: 4 from 100M parameters up."""
    threads: Annotated[Count, Field(le=1024)] | None = None
    """CPU threads of torch; default: torch's own choice."""
    timeout: Annotated[int, NUMBER, Field(ge=10)] = 300
    """Seconds after which a collective counts as hung, once the first step is done."""


class EarlyStop(Strict):
    """Stop when the held-out loss has not fallen by `min_delta` for `patience` evaluations, measured from the last one at which
    it had. Refused where the run has too few evaluations for that."""

    patience: Count
    """Evaluations without progress before the run ends."""
    min_delta: NonNegative = 0.0
    """Smallest fall of the loss that counts as progress."""


class EvalConfig(Strict):
    """Held-out loss during training, before the first and after the last step."""

    every: Count = 500
    """Steps between evaluations."""
    tokens: Count = 131072
    """Held-out tokens scored each time (all, if there are fewer); the same ones every time."""
    early_stop: EarlyStop | None = None


class CheckpointConfig(Strict):
    """Written in the background; the last one is always complete."""

    every: Count = 500
    """Steps between checkpoints."""
    keep_last: Count = 3
    """Newest checkpoints that are kept."""
    keep_best: Annotated[int, NUMBER, Field(ge=0)] = 2
    """Checkpoints with the lowest held-out loss that are kept beside the last ones. Only steps at which the held-out loss
    is measured count, so let `eval.every` divide `checkpoint.every`."""


class WandbConfig(Strict):
    """Weights & Biases. The API key comes from the environment only."""

    project: str
    """Project to record the run under."""
    mode: Literal["offline", "online"] = "offline"
    """offline: into the run folder, to be uploaded later with `wandb sync`."""


class MonitorConfig(Strict):
    """What is shown and recorded beside metrics.jsonl."""

    progress: bool = True
    """Progress bar (off when stdout is not a terminal: then a line now and then)."""
    layer_gradients: Annotated[int, NUMBER, Field(ge=0)] = 10
    """Record gradient norms per layer every this many steps; 0: never."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run folder."""
    wandb: WandbConfig | None = None


class ProfileConfig(Strict):
    """torch profiler trace (and memory snapshot) of some steps, written to RUN/profile/."""

    steps: str
    """First and last step to trace, such as "10-12"."""
    memory: bool = False
    """Also write a CUDA memory snapshot, to be opened at pytorch.org/memory_viz."""

    @field_validator("steps")
    @classmethod
    def _range(cls, value: str) -> str:
        first, dash, last = value.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash) and 0 < int(first) <= int(last or first)):
            raise ValueError('expected a range of steps such as "10-12"')
        return value

    def bounds(self) -> tuple[int, int]:
        """First and last step, both included."""
        first, _, last = self.steps.partition("-")
        return int(first), int(last or first)


class PretrainRun(Strict):
    """Next-token prediction on documents: from random weights, or on from a model (also with an adapter)."""

    version: Literal[1]
    """Version of this file format."""
    kind: Literal["pretrain"]
    """The stage of training."""
    name: Name
    """The run lives in `runs_dir`/`name`; the same command run again continues it."""
    runs_dir: str = "runs"
    """Folder that holds the run folders."""
    seed: Annotated[int, NUMBER, Field(ge=0, lt=2**31)] = 0
    """Of the initial weights and the order of the data."""
    model: ModelConfig
    adapter: AdapterConfig | None = None
    """Train low-rank adapters instead of the weights."""
    data: DataConfig
    batch: BatchConfig
    train: TrainConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    predict: PredictConfig = PredictConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    compute: ComputeConfig = ComputeConfig()
    monitor: MonitorConfig = MonitorConfig()
    profile: ProfileConfig | None = None

    @model_validator(mode="before")
    @classmethod
    def _weights(cls, content: Any) -> Any:
        """A source without a weight counts 1, unless sizes take the place of weights."""
        data, train = (content.get(k) for k in ("data", "train")) if isinstance(content, dict) else (None, None)
        sources = data.get("sources") if isinstance(data, dict) else None
        if not isinstance(sources, list) or not all(isinstance(source, dict) for source in sources):
            return content
        weighted = any(source.get("weight") is not None for source in sources)
        epochs = isinstance(train, dict) and train.get("epochs") is not None
        if epochs and len(sources) > 1 and not weighted:
            return content
        filled = [source if source.get("weight") is not None else {**source, "weight": 1.0} for source in sources]
        return {**content, "data": {**(data or {}), "sources": filled}}

    @model_validator(mode="after")
    def _check(self) -> PretrainRun:
        tokens, seq_len = self.batch.tokens, self.data.seq_len
        if tokens is not None and tokens % seq_len:
            raise ValueError(f"batch.tokens = {tokens} is not a multiple of data.seq_len = {seq_len}")
        if self.tokens_per_step > LARGEST_STEP:
            raise ValueError(f"batch: {self.tokens_per_step:,} tokens in one step; at most {LARGEST_STEP:,}")
        if isinstance(self.batch.micro, int) and self.rows_per_step % self.batch.micro:
            raise ValueError(
                f"batch.micro = {self.batch.micro} does not divide the {self.rows_per_step} rows of a step"
            )
        if self.eval.early_stop is not None and not self.data.held_out.fraction:
            raise ValueError("eval.early_stop needs held-out documents (data.held_out.fraction is 0)")
        if self.adapter is not None and self.model.preset is not None:
            raise ValueError("adapter: an adapter on a preset would train on frozen random weights (use model.path)")
        if self.adapter is not None and self.model.init == "random":
            raise ValueError("adapter: with model.init = 'random' it would train on frozen random weights")
        return self

    @model_validator(mode="after")
    def _check_strategy(self) -> PretrainRun:
        """Options of a strategy that is not the one named would be read by nobody."""
        named = self.compute.strategy
        for name in ("fsdp", "deepspeed"):
            options = getattr(self.compute, name)
            changed = options.model_dump(exclude_defaults=True)
            if changed and named not in ("auto", name):
                key, value = next(iter(changed.items()))
                shown = str(value).lower() if isinstance(value, bool) else repr(value)
                raise ValueError(
                    f"compute.{name}.{key} = {shown}: read by strategy {name} only, and compute.strategy = {named!r} "
                    "(remove one of them)"
                )
        return self

    def hub_names(self) -> dict[str, str]:
        """What may be a name on the Hugging Face Hub, by key: of the model and of the tokenizer."""
        tokenizer = self.data.tokenizer
        names = {"model.path": self.model.path, "data.tokenizer.path": tokenizer.path if tokenizer else None}
        return {key: name for key, name in names.items() if name is not None}

    def hub_data(self) -> list[str]:
        """Data sets that may be on the Hub."""
        return [source.path for source in self.data.sources if source.kind == "huggingface"]

    @property
    def mixed_by_size(self) -> bool:
        """Are the sizes of the sources their weights? So an epoch is one pass over each of them."""
        return self.train.epochs is not None and all(source.weight is None for source in self.data.sources)

    @property
    def rows_per_step(self) -> int:
        """Rows of data.seq_len in one optimizer step, over all devices."""
        return self.batch.sequences or (self.batch.tokens or 0) // self.data.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens (padding included) in one optimizer step, over all devices."""
        return self.rows_per_step * self.data.seq_len


RunConfig = Annotated[PretrainRun, Field()]
"""Discriminated by `kind`; later stages (sft, dpo, grpo, ...) join this union."""
SCHEMA: TypeAdapter[PretrainRun] = TypeAdapter(RunConfig)
