"""What the ranks of the FP8 tests do; results are JSON."""

from unittest import mock

from scale.config.run import Fp8Config, FsdpConfig
from scale.models.fp8 import convert
from scale.objectives import vocabulary
from scale.objectives.causal_lm import CausalLM
from scale.parallel.fsdp import Fsdp
from scale.parallel.single import Single
from tests.parallel.lm import VOCAB, Rows, digests, meta_model, prepared, train, whole_loss

FP8 = Fp8Config(smallest=16, emulate=True)
STEPS = 6


def run(strategy, rows, precision="fp32", gather=False, loss="full"):
    """A few steps; in fp8 only the products of the layers are rounded."""
    model, weights = meta_model()
    if precision == "fp8":
        convert(model, FP8, gather)
    stepper = prepared(strategy, model, weights)
    stepper.root.objective = stepper.objective = CausalLM(loss=loss)
    with mock.patch.object(vocabulary, "CHUNK", 7 * VOCAB):
        return train(stepper, rows, STEPS) | {
            "names": sorted(strategy.tensors()), "digest": digests(strategy), "after": whole_loss(stepper.root),
        }  # fmt: skip


def on_two(ranks):
    def fsdp(**options):
        return run(Fsdp(ranks, FsdpConfig()), Rows(ranks.rank, ranks.world_size), **options)

    return {
        "fp8": fsdp(precision="fp8"),
        "gathered": fsdp(precision="fp8", gather=True),
        "chunked": fsdp(loss="chunked"),
    }


def on_one(**options):
    return run(Single("cpu"), Rows(), **options)
