"""All directions by the name that a config gives them."""

from __future__ import annotations

from scale.config.predict import DirectionName
from scale.predict.weights.directions.drift import Drift
from scale.predict.weights.directions.masked_slope import MaskedSlope
from scale.predict.weights.directions.optimizer import LastUpdate
from scale.predict.weights.directions.protocol import Direction
from scale.predict.weights.directions.singular import Singular
from scale.predict.weights.directions.window import WindowMeans

DIRECTIONS: dict[DirectionName, type[Direction]] = {
    "drift": Drift,
    "window": WindowMeans,
    "optimizer": LastUpdate,
    "singular": Singular,
    "masked_slope": MaskedSlope,
}
