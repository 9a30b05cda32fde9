"""What `auto` means on faked machines, and the memory arithmetic behind it, against values computed by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from scale.errors import MissingExtra, UsageError
from scale.hardware import (
    CARDS,
    Hardware,
    card,
    card_named,
    choose_attention,
    choose_compile,
    choose_kernels,
    choose_loss,
    choose_micro_rows,
    choose_precision,
    choose_recompute,
    detect,
    has_fp8,
    peak_flops,
    sum_dtype,
)
from scale.hardware.machine import group_limits
from scale.models.size import activation_bytes_per_token

GIB = 2**30
A100 = Hardware("cuda", "NVIDIA A100-SXM4-80GB", 80 * GIB, 16, (8, 0))
H100 = Hardware("cuda", "NVIDIA H100 80GB HBM3", 80 * GIB, 16, (9, 0), 8)
H200 = Hardware("cuda", "NVIDIA H200", 139 * GIB, 16, (9, 0), 8)
B200 = Hardware("cuda", "NVIDIA B200", 178 * GIB, 16, (10, 0), 8)
RTX = Hardware("cuda", "NVIDIA GeForce RTX 4090", 24 * GIB, 16, (8, 9))
T4 = Hardware("cuda", "Tesla T4", 16 * GIB, 8, (7, 5))
MPS = Hardware("mps", "Apple GPU", 16 * GIB, 8)
CPU = Hardware("cpu", "some CPU", 16 * GIB, 8)
MODERN, OLD = (A100, H100, H200, B200, RTX), (T4, MPS, CPU)
SINKS = ("eager", "flex_attention")  # what GPT-OSS supports


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """The optional packages that count as installed."""
    here: set[str] = set()
    monkeypatch.setattr("scale.hardware.choices.installed", lambda name: name in here)
    return here


@pytest.mark.parametrize("hardware", [*MODERN, *OLD])
def test_precision(hardware: Hardware) -> None:
    assert choose_precision("auto", hardware).value == ("bf16" if hardware in MODERN else "fp32")
    assert choose_precision("fp32", hardware).value == "fp32"


def test_fp8_is_chosen_by_measured_speed_alone() -> None:
    for hardware in (H100, H200, B200, RTX):
        assert has_fp8(hardware)
        assert choose_precision("auto", hardware, speedup=1.30).value == "fp8"
        slow = choose_precision("auto", hardware, speedup=1.04)
        assert slow.value == "bf16" and "1.04x" in slow.reason
        assert choose_precision("fp8", hardware).value == "fp8"
    for hardware in (A100, *OLD):
        assert not has_fp8(hardware)
        with pytest.raises(UsageError, match=rf"compute\.precision = 'fp8': {hardware.name} has none"):
            choose_precision("fp8", hardware)
        assert "emulated" in choose_precision("fp8", hardware, emulate=True).reason


def test_bf16_is_refused_by_cards_without_it_and_only_by_them() -> None:
    with pytest.raises(UsageError, match=r"compute\.precision = 'bf16': Tesla T4"):
        choose_precision("bf16", T4)
    assert {choose_precision("bf16", h).value for h in (*MODERN, MPS, CPU)} == {"bf16"}


@pytest.mark.parametrize(
    ("hardware", "mode"),
    [(A100, "default"), (RTX, "default"), (H100, "max-autotune"), (H200, "max-autotune"), (B200, "max-autotune"),
     (T4, "default"), (MPS, "off"), (CPU, "off")],
)  # fmt: skip
def test_compile(hardware: Hardware, mode: str) -> None:
    assert choose_compile("auto", hardware).value == mode
    for asked in ("off", "default", "max-autotune"):
        assert choose_compile(asked, hardware).value == asked


def test_nothing_is_compiled_under_deepspeed() -> None:
    for hardware in (H100, CPU):
        for asked in ("auto", "off"):
            assert choose_compile(asked, hardware, "deepspeed").value == "off"
        assert "DeepSpeed" in choose_compile("auto", hardware, "deepspeed").reason
        assert choose_compile("default", hardware, "fsdp").value == "default"
        for asked in ("default", "max-autotune"):
            with pytest.raises(UsageError, match=rf"compute\.compile = '{asked}': not with .*deepspeed.* \(use fsdp"):
                choose_compile(asked, hardware, "deepspeed")


@pytest.mark.parametrize("hardware", MODERN)
def test_attention_of_packed_documents_on_a_gpu(hardware: Hardware, packages: set[str]) -> None:
    assert choose_attention("auto", hardware).value == "flex_attention"
    assert choose_attention("auto", hardware, ("sdpa", "eager")).value == "sdpa"
    packages.add("flash_attn")
    assert choose_attention("auto", hardware).value == "flash_attention_2"
    assert choose_attention("auto", hardware, precision="fp32").value == "flex_attention"
    assert choose_attention("auto", hardware, cross_documents=True).value == "sdpa"
    assert choose_attention("auto", hardware, SINKS).value == "flex_attention"
    assert choose_attention("auto", hardware, SINKS, cross_documents=True).value == "flex_attention"


@pytest.mark.parametrize("hardware", OLD)
def test_attention_elsewhere(hardware: Hardware, packages: set[str]) -> None:
    packages.add("flash_attn")
    for cross in (False, True):
        assert choose_attention("auto", hardware, cross_documents=cross).value == "sdpa"
        assert choose_attention("auto", hardware, SINKS, cross).value == "eager"


def test_attention_that_cannot_run_is_refused_with_what_can(packages: set[str]) -> None:
    for asked in ("flex_attention", "flash_attention_2"):
        with pytest.raises(UsageError, match=rf"compute\.attention = '{asked}'.*\(use sdpa\)"):
            choose_attention(asked, CPU)
    with pytest.raises(UsageError, match=r"'sdpa': this model does not support it \(it has: eager, flex_attention\)"):
        choose_attention("sdpa", A100, SINKS)
    with pytest.raises(UsageError, match=r"capability 8\.0, this is Tesla T4"):
        choose_attention("flash_attention_2", T4)
    with pytest.raises(MissingExtra, match=r"scale-trainer\[flash\]"):
        choose_attention("flash_attention_2", A100)
    packages.add("flash_attn")
    assert choose_attention("flash_attention_2", A100).value == "flash_attention_2"
    with pytest.raises(UsageError, match="does not compute in fp32"):
        choose_attention("flash_attention_2", A100, precision="fp32")


def test_kernels(packages: set[str]) -> None:
    assert choose_kernels("auto", H100, "llama", known=True).value == "off"
    with pytest.raises(MissingExtra, match=r"scale-trainer\[kernels\]"):
        choose_kernels("liger", H100, "llama", known=True)
    packages.add("liger_kernel")
    for hardware in (*MODERN, T4):
        assert choose_kernels("auto", hardware, "llama", known=True).value == "liger"
        assert choose_kernels("auto", hardware, "opt", known=False).value == "off"
        assert choose_kernels("off", hardware, "llama", known=True).value == "off"
        with pytest.raises(UsageError, match="no kernels for 'opt'"):
            choose_kernels("liger", hardware, "opt", known=False)
    for hardware in (MPS, CPU):
        assert choose_kernels("auto", hardware, "llama", known=True).value == "off"
        with pytest.raises(UsageError, match=r"compute\.kernels = 'liger': its kernels need CUDA"):
            choose_kernels("liger", hardware, "llama", known=True)


@pytest.mark.parametrize("hardware", [*MODERN, *OLD])
def test_loss(hardware: Hardware, packages: set[str]) -> None:
    """1 GiB is 2048 tokens x 43690.67 entries x 4 bytes x 3."""
    assert choose_loss("auto", hardware, 2048, 43_690, None).value == "full"
    assert choose_loss("auto", hardware, 2048, 43_691, None).value == "chunked"
    scaled = choose_loss("auto", hardware, 2048, 200_000, "its logits are scaled")
    assert scaled.value == "full" and "scaled" in scaled.reason
    assert choose_loss("chunked", hardware, 1, 1, None).value == "chunked"
    with pytest.raises(UsageError, match=r"compute\.loss = 'chunked': its logits are scaled \(use full\)"):
        choose_loss("chunked", hardware, 1, 1, "its logits are scaled")


def test_cce_needs_cuda_its_package_and_no_fp32(packages: set[str]) -> None:
    for hardware in (MPS, CPU):
        with pytest.raises(UsageError, match=r"compute\.loss = 'cce': its kernel needs CUDA"):
            choose_loss("cce", hardware, 1, 1, None)
    with pytest.raises(UsageError, match="fp32"):
        choose_loss("cce", H100, 1, 1, None, precision="fp32")
    with pytest.raises(MissingExtra, match=r"scale-trainer\[cce\]"):
        choose_loss("cce", H100, 1, 1, None)
    packages.add("cut_cross_entropy")
    assert "untested" in choose_loss("cce", H100, 1, 1, None).reason


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


def test_peaks_and_bandwidth_of_known_cards_are_their_datasheets() -> None:
    assert float(peak_flops(A100, "bf16").value) == 312e12
    assert float(peak_flops(H100, "bf16").value) == 989e12
    assert float(peak_flops(H100, "fp8").value) == 1979e12
    assert float(peak_flops(B200, "fp8").value) == 4500e12
    assert A100.peak("fp8") is None and T4.peak("bf16") is None and CPU.peak("bf16") is None
    assert (H200.bandwidth, RTX.bandwidth, CPU.bandwidth) == (4800e9, 1008e9, None)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx6000-ada"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),  # a part of a card
        ("NVIDIA GB200", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA L40", None),
    ],
)
def test_cards_are_told_apart_by_the_name_of_their_driver(name: str, short: str | None) -> None:
    assert card_named(name) == (CARDS[short] if short else None)


def test_a_card_by_name_without_having_it() -> None:
    for short, row in CARDS.items():
        planned = Hardware.of(short)
        assert planned.facts == row == card(short.upper()), short
    h100 = Hardware.of("h100", count=8)
    assert (h100.count, h100.capability, h100.memory) == (8, (9, 0), 79 * GIB)
    with pytest.raises(UsageError, match=r"GPU 'h1000' is not known \(did you mean h100\? choose one of a100,") as said:
        card("h1000")
    assert "v100" not in str(said.value) and "t4" not in str(said.value)  # could not be planned with


def test_memory_of_a_control_group(tmp_path: Path) -> None:
    def limit(path: str, value: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(f"{value}\n")

    limit("job/step/memory.max", "max")
    limit("job/memory.max", "4096")
    limit("memory.max", "8192")
    assert group_limits("0::/job/step\n", tmp_path) == [4096, 8192]
    assert group_limits("0::/not/mounted/here\n", tmp_path) == [8192]
    limit("memory/docker/memory.limit_in_bytes", "2048")
    assert group_limits("5:cpu,cpuacct:/docker\n4:memory:/docker\n", tmp_path) == [2048]
    assert group_limits("", tmp_path) == []


def test_sums_are_float64_where_there_is_one() -> None:
    assert [sum_dtype(d) for d in ("cpu", "cuda:1", "mps")] == [torch.float64, torch.float64, torch.float32]
    assert sum_dtype(torch.device("mps", 0)) == torch.float32


def test_this_machine_and_a_device_that_is_not_there() -> None:
    found = detect("cpu")
    assert found.device == "cpu" and found.capability is None and found.cores > 0 and found.memory > 2**28
    if not torch.cuda.is_available():
        assert detect() == found
        with pytest.raises(UsageError, match=r"compute\.device = 'cuda'.*\(it has: cpu\)"):
            detect("cuda")


def test_activation_bytes_per_token() -> None:
    """A layer of width 8 and ffn 20 keeps 14 x 8 + 4 x 20 = 192 values; the logits 3 x 100 of 4 bytes."""
    config = LlamaConfig(
        hidden_size=8, intermediate_size=20, num_hidden_layers=6, num_attention_heads=2, vocab_size=100
    )
    assert activation_bytes_per_token(config, None, 4) == 6 * 192 * 4 + 1200
    assert activation_bytes_per_token(config, None, 2) == 6 * 192 * 2 + 1200
    assert activation_bytes_per_token(config, 1, 4) == 6 * 8 * 4 + 1200  # of each layer its input alone
    assert activation_bytes_per_token(config, 4, 4) == 4 * 192 * 4 + 2 * 8 * 4 + 1200  # layers 0 and 4


class Products:
    """Times of matrix products, in seconds, as planted; one of 1024 x 1024 takes 2 x 1024^3 operations."""

    def __init__(self, monkeypatch, folder):
        self.seconds = 1.0
        monkeypatch.setattr("scale.hardware.peak._time_product", lambda a: self.seconds)
        monkeypatch.setattr("scale.hardware.peak.REPEATS", 2)
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder))

    def peak(self, seconds, precision="fp32"):
        self.seconds = seconds
        found = peak_flops(CPU, precision)
        return float(found.value) / (2 * 1024**3), found.reason


def test_the_peak_of_a_cpu_is_the_best_ever_timed_on_this_machine(monkeypatch, tmp_path):
    timed = Products(monkeypatch, tmp_path / "cache")
    assert timed.peak(0.5)[0] == pytest.approx(2, rel=1e-3)
    assert timed.peak(0.25)[0] == pytest.approx(4, rel=1e-3)
    value, reason = timed.peak(1.0)  # the machine is busy
    assert value == pytest.approx(4, rel=1e-3) and "the machine is busy" in reason
    assert timed.peak(1.0, "bf16")[0] == pytest.approx(1, rel=1e-3), "another kind of product"
    assert "busy" not in timed.peak(0.25)[1]


@pytest.mark.parametrize("content", ["", "[1, 2]", "{", '{"a": "b"}'])
def test_a_peak_that_cannot_be_kept_or_read_is_that_of_now(content, monkeypatch, tmp_path):
    timed = Products(monkeypatch, tmp_path)
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "peak_flops.json").write_text(content)
    assert timed.peak(0.5)[0] == pytest.approx(2, rel=1e-3) and timed.peak(1.0)[0] == pytest.approx(2, rel=1e-3)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert timed.peak(1.0)[0] == pytest.approx(1, rel=1e-3)
