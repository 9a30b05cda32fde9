"""The world model of a run: what full steps will bring, foreseen by an ensemble of recurrent state-space models."""

from scale.predict.world.foresight import Foresight

__all__ = ["Foresight"]
