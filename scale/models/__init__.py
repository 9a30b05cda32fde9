"""Models: presets, loading, initial weights, adapters, memory and FLOP arithmetic."""

from scale.models.quiet import quiet_bars, quiet_torchao

quiet_torchao()  # before the first import of transformers' models
quiet_bars()
