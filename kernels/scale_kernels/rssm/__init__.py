"""Free rollout of an ensemble of recurrent state-space models. See README.md beside this file."""

from scale_kernels.rssm.op import rollout
from scale_kernels.rssm.weights import RssmWeights

__all__ = ["RssmWeights", "rollout"]
