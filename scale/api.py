"""The public Python face.

>>> from scale.api import build_trainer, load_config
>>> build_trainer(load_config("configs/demo.yaml", ["train.steps=50"])).fit()

or, with parts of your own: `Trainer(model, source, objective, folder=..., steps=...)`. The protocols that parts
implement are in `scale.protocols`.
"""

from scale.build import build_trainer
from scale.config import PretrainRun, load_config
from scale.config.optim import OptimConfig, ScheduleConfig, SpikeConfig
from scale.config.run import CheckpointConfig, EarlyStop, ProfileConfig
from scale.errors import ScaleError, UsageError
from scale.evaluate.generate import generate
from scale.load import load_run
from scale.objectives.causal_lm import CausalLM
from scale.parallel.single import Single
from scale.protocols import Batch, Group, Judge, Loss, Objective, Score, Source, StepReport, Strategy, Term
from scale.trainer import Trainer

__all__ = [
    "Batch", "CausalLM", "CheckpointConfig", "EarlyStop", "Group", "Judge", "Loss", "Objective", "OptimConfig",
    "PretrainRun", "ProfileConfig", "ScaleError", "ScheduleConfig", "Score", "Single", "Source", "SpikeConfig",
    "StepReport", "Strategy", "Term", "Trainer", "UsageError", "build_trainer", "generate", "load_config", "load_run",
]  # fmt: skip
