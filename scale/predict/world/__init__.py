"""The world model of a run: what full steps will bring, forecast by an ensemble of recurrent state-space models."""

from scale.predict.world.world_model import WorldModel

__all__ = ["WorldModel"]
