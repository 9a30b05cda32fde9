"""What processes of their own do for the GPU tests; results are JSON."""

from scale.config.run import FsdpConfig
from scale.models.kernels import apply_liger
from scale.parallel.fsdp import Fsdp
from scale.parallel.single import Single
from tests.gpu.parts import Steps, make_stepper, single


class Dealt(Steps):
    """Rank r of w reads rows r, r + w, ... of every step."""

    def __init__(self, rank, world_size):
        super().__init__()
        self.rank, self.world_size = rank, world_size

    def draw(self):
        group = super().draw()
        group.batches = [{k: v[self.rank :: self.world_size] for k, v in b.items()} for b in group.batches]
        return group


def with_fsdp(ranks, device):
    """Losses of FSDP2 on the GPU of each rank, and of one device where there is one rank."""
    ranks.place(device)
    stepper = make_stepper(Fsdp(ranks, FsdpConfig()))
    source = Dealt(ranks.rank, ranks.world_size)
    out = {"fsdp": [stepper.step(source).loss for _ in range(6)]}
    return out | ({"single": single(device)} if ranks.world_size == 1 else {})


def with_liger(ranks, device):
    """Losses with Liger's kernels, whose patch of transformers holds for the whole process."""
    off = single(device, "bf16")
    apply_liger("llama")
    stepper = make_stepper(Single(device, "bf16"))
    source = Steps()
    return {
        "off": off,
        "liger": [stepper.step(source).loss for _ in range(6)],
        "norms": sorted({type(m).__module__ for m in stepper.root.modules() if "Norm" in type(m).__name__}),
    }
