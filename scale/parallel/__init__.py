"""Strategies: where weights live, how gradients meet, how optimizers step."""
