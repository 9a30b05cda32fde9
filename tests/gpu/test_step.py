"""Steps on a GPU against the same steps on a CPU in fp32."""

import pytest
import torch

from scale.config.run import Fp8Config
from scale.hardware import detect, has_fp8
from scale.objectives import vocabulary
from scale.parallel.single import Single
from tests.distributed.harness import run_ranks
from tests.gpu import DEVICE, GPU, only_cuda
from tests.gpu.parts import losses, make_stepper, peak_memory, single

pytestmark = GPU
VOCABULARY = 32_768


@pytest.fixture(scope="module")
def exact():
    return single("cpu")


def test_fp32_is_that_of_a_cpu_and_learns(exact):
    assert single(DEVICE) == pytest.approx(exact, rel=1e-4)
    assert exact[-1] < exact[0] - 0.2


def test_bf16_follows_fp32(exact):
    rounded = single(DEVICE, "bf16")
    assert rounded == pytest.approx(exact, rel=1e-2) and rounded != pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise"])
def test_fp8_follows_fp32(recipe, exact):
    pytest.importorskip("torchao")
    if DEVICE == "cuda" and not has_fp8(detect("cuda")):
        pytest.skip("this GPU has no FP8")
    fp8 = Fp8Config(recipe=recipe, smallest=64, emulate=DEVICE == "cpu")
    rounded = single(DEVICE, "fp8", fp8=fp8)
    assert rounded == pytest.approx(exact, rel=3e-2) and rounded != single(DEVICE, "bf16")


@only_cuda
def test_compiled_follows_fp32(exact):
    assert losses(make_stepper(Single(DEVICE, "bf16", "default"))) == pytest.approx(exact, rel=1e-2)


@only_cuda
def test_liger_follows_what_it_replaces():
    pytest.importorskip("liger_kernel")
    ran = run_ranks("tests.gpu.ranks:with_liger", 1, device=DEVICE)[0]
    assert any("liger" in module for module in ran["norms"])
    assert ran["liger"] == pytest.approx(ran["off"], rel=1e-2)


def test_loss_in_chunks_is_the_same(monkeypatch):
    monkeypatch.setattr(vocabulary, "CHUNK", VOCABULARY * 128)
    whole, parts = (single(DEVICE, loss=loss, steps=3, vocab_size=VOCABULARY) for loss in ("full", "chunked"))
    assert parts == pytest.approx(whole, rel=5e-5)


@only_cuda
def test_loss_in_chunks_takes_less_memory(monkeypatch):
    """1024 tokens: whole logits take 128 MiB in fp32, thrice; 128 at a time an eighth of that."""
    monkeypatch.setattr(vocabulary, "CHUNK", VOCABULARY * 128)

    def peak(loss):
        stepper = make_stepper(Single(DEVICE), loss=loss, vocab_size=VOCABULARY)
        return peak_memory(lambda: losses(stepper, 2))[1]

    assert peak("chunked") < peak("full") - 2 * 100 * 2**20


@only_cuda
def test_too_large_a_micro_batch_is_halved_and_the_losses_stay():
    """Memory really runs out: all but 1100 MiB of the GPU is taken."""
    small = losses(make_stepper(Single(DEVICE), vocab_size=VOCABULARY), 3, rows=32, micro=2)
    torch.cuda.empty_cache()
    events = []
    stepper = make_stepper(Single(DEVICE), events=events, vocab_size=VOCABULARY)
    losses(stepper, 1, rows=2, micro=2)  # moments and workspaces have their place
    stepper = make_stepper(Single(DEVICE), events=events, vocab_size=VOCABULARY)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    ballast = torch.empty(max(0, free - 1100 * 2**20), dtype=torch.uint8, device=DEVICE)
    try:
        large = losses(stepper, 3, rows=32, micro=32)  # 1 GiB of logits alone
    finally:
        del ballast
        torch.cuda.empty_cache()
    assert stepper.split >= 2 and events[0][0] == "out_of_memory" and "now 16 rows" in events[0][1]
    assert large == pytest.approx(small, rel=1e-4)
