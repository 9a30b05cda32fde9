"""Models: presets, loading, initial weights, adapters, memory and FLOP arithmetic."""
