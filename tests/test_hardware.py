"""What `auto` means on faked machines, and the memory arithmetic behind it, against values computed by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from scale.errors import UsageError
from scale.hardware import (
    Hardware,
    choose_attention,
    choose_compile,
    choose_micro_rows,
    choose_precision,
    choose_recompute,
    detect,
    peak_flops,
)
from scale.models.size import activation_bytes_per_token, model_size, state_bytes

GIB = 2**30
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 80 * GIB, 16, (8, 0))
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 16, (9, 0))
T4 = Hardware("cuda", "Tesla T4", 16 * GIB, 8, (7, 5))
CPU = Hardware("cpu", "some CPU", 16 * GIB, 8)


@pytest.mark.parametrize(("hardware", "precision"), [(A100, "bf16"), (H100, "bf16"), (T4, "fp32"), (CPU, "fp32")])
def test_precision(hardware: Hardware, precision: str) -> None:
    assert choose_precision("auto", hardware).value == precision
    assert choose_precision("fp32", hardware).value == "fp32"


def test_bf16_is_refused_by_cards_without_it_and_only_by_them() -> None:
    with pytest.raises(UsageError, match=r"compute\.precision = 'bf16': Tesla T4"):
        choose_precision("bf16", T4)
    assert [choose_precision("bf16", h).value for h in (A100, H100, CPU)] == ["bf16"] * 3


@pytest.mark.parametrize(
    ("hardware", "mode"), [(A100, "default"), (H100, "max-autotune"), (T4, "default"), (CPU, "off")]
)
def test_compile(hardware: Hardware, mode: str) -> None:
    assert choose_compile("auto", hardware).value == mode
    for asked in ("off", "default", "max-autotune"):
        assert choose_compile(asked, hardware).value == asked


def test_attention() -> None:
    for hardware in (A100, H100, T4, CPU):
        assert choose_attention("auto", hardware).value == "sdpa"
        assert choose_attention("eager", hardware).value == "eager"
    for asked in ("flex_attention", "flash_attention_2"):
        assert choose_attention(asked, A100).value == asked
        with pytest.raises(UsageError, match=rf"compute\.attention = '{asked}'.*\(use sdpa\)"):
            choose_attention(asked, CPU)


@pytest.mark.parametrize(
    ("asked", "parameters", "value"),
    [
        ("auto", 89_999_999, "off"),
        ("auto", 90_000_000, "4"),
        ("auto", 10**10, "4"),
        ("off", 10**10, "off"),
        (2, 1, "2"),
    ],
)
def test_recompute(asked: str | int, parameters: int, value: str) -> None:
    assert choose_recompute(asked, parameters).value == value


@pytest.mark.parametrize(
    ("rows", "seq_len", "per_token", "state", "micro"),
    [
        (64, 1024, 2**20, 16 * GIB, 32),  # (80 - 16) / 2 = 32 GiB at 1 GiB a row
        (64, 1024, 2**20, 20 * GIB, 16),  # 30 rows fit, 16 divides
        (60, 1024, 2**20, 20 * GIB, 30),
        (7, 1024, 2**20, 70 * GIB, 1),  # 5 fit, 7 is prime
        (8, 1024, 2**10, 0, 8),  # never more than there are
        (8, 8192, 2**24, 79 * GIB, 1),  # not one fits by the estimate: the dry run decides
        (8, 8192, 2**24, 90 * GIB, 1),
    ],
)
def test_micro_rows_divide_the_rows_and_respect_the_memory(
    rows: int, seq_len: int, per_token: int, state: int, micro: int
) -> None:
    assert choose_micro_rows(rows, seq_len, per_token, state, A100).value == str(micro)


@pytest.mark.parametrize(("seq_len", "micro"), [(512, 16), (1024, 8), (3000, 2), (8192, 1), (20_000, 1)])
def test_micro_rows_on_a_cpu_hold_at_most_8192_tokens(seq_len: int, micro: int) -> None:
    assert choose_micro_rows(64, seq_len, 1, 0, CPU).value == str(micro)
    assert choose_micro_rows(64, seq_len, 1, 0, A100).value == "64"


def test_peak_flops_of_a_known_card_is_its_datasheet() -> None:
    assert float(peak_flops(A100, "bf16").value) == 312e12
    assert float(peak_flops(H100, "bf16").value) == 989e12


def test_this_machine_and_a_device_that_is_not_there() -> None:
    found = detect("cpu")
    assert found.device == "cpu" and found.capability is None and found.cores > 0 and found.memory > 2**28
    if not torch.cuda.is_available():
        assert detect() == found
        with pytest.raises(UsageError, match=r"compute\.device = 'cuda'.*\(it has: cpu\)"):
            detect("cuda")


def test_state_bytes() -> None:
    """All 4-byte: weights of everything; a gradient and the moments of what is trained."""
    model = nn.Sequential(nn.Linear(10, 5), nn.Linear(5, 2))  # 55 + 12 parameters
    assert state_bytes(model_size(model), moments=2) == 4 * 67 * 4
    assert state_bytes(model_size(model), moments=1) == 3 * 67 * 4
    model[0].requires_grad_(False)
    assert state_bytes(model_size(model), moments=2) == 67 * 4 + 3 * 12 * 4


def test_activation_bytes_per_token() -> None:
    """A layer of width 8 and ffn 20 keeps 14 x 8 + 4 x 20 = 192 values; the logits 3 x 100 of 4 bytes."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=20, num_hidden_layers=6, num_attention_heads=2, vocab_size=100
    )
    assert activation_bytes_per_token(config, None, 4) == 6 * 192 * 4 + 1200
    assert activation_bytes_per_token(config, None, 2) == 6 * 192 * 2 + 1200
    assert activation_bytes_per_token(config, 1, 4) == 6 * 8 * 4 + 1200  # of each layer its input alone
    assert activation_bytes_per_token(config, 4, 4) == 4 * 192 * 4 + 2 * 8 * 4 + 1200  # layers 0 and 4
