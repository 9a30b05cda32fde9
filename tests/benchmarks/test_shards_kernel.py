from __future__ import annotations

import math

import pytest
import torch

from benchmarks import shards_kernel, shards_providers
from benchmarks.common import read_csv
from benchmarks.shards_kernel import CASES, gate, main, measure
from scale.errors import ScaleError


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure the GPU")
def test_cpu_paths_beside_a_copy(tmp_path, capsys):
    assert main(["--sizes", "100000", "--rounds", "2", "--out", str(tmp_path)]) == 0
    assert "no GPU: nothing is said about the kernels" in capsys.readouterr().out
    rows = read_csv(tmp_path / "shards_kernel.csv")
    assert {row["config"] for row in rows} == {"encode fp32", "delta fp32 K=1", "delta fp32 K=4"}
    speeds = [row for row in rows if row["metric"] == "bandwidth" and row["config"] == "encode fp32"]
    assert [row["provider"] for row in speeds] == ["scale", "torch._foreach", "reference", "copy"]
    assert float(speeds[-1]["ratio"]) == 1 and all(row["baseline"] == "copy" for row in speeds)


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    measured = iter([measure(CASES[0], 10**5, 1, "cpu")])
    monkeypatch.setattr(
        shards_kernel, "measure", lambda *_: next(measured, None) or (_ for _ in ()).throw(TimeoutError)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(TimeoutError):
        main(["--sizes", "100000", "--rounds", "1", "--out", str(tmp_path)])
    assert {row["config"] for row in read_csv(tmp_path / "shards_kernel.csv")} == {"encode fp32"}


def test_every_provider_can_fail_the_gate(monkeypatch):
    for case in CASES:
        gate(case, "cpu")
    monkeypatch.setattr(shards_providers, "foreach_encode", lambda shards: torch.zeros(16, 12))
    with pytest.raises(ScaleError, match=r"encode fp32: torch\._foreach is off by"):
        gate(CASES[0], "cpu")
    monkeypatch.setattr(shards_providers, "foreach_delta", lambda shards: None)
    with pytest.raises(ScaleError, match=r"delta fp32 K=1: torch\._foreach is off by"):
        gate(CASES[2], "cpu")


def test_compiled_providers_compute_the_same(monkeypatch):
    monkeypatch.setattr(shards_providers, "_compiled", lambda function: function)
    for case in CASES:
        shards, _ = case.make(shards_kernel.GATE_SIZE, "cpu")
        before = [x.clone() for x in shards.lists[0]]
        if case.kernel == "encode":
            found_GC = shards_providers.compiled_encode(shards)
            assert shards_kernel.encode_error(shards, found_GC) < 1e-5
        else:
            shards_providers.compiled_delta(shards)
            assert shards_kernel.delta_error(shards, before) < (2**-8 if case.dtype is torch.bfloat16 else 1e-6)


def test_bytes_and_shapes():
    shapes, group_N = shards_providers.model_shapes(10**6)
    assert sum(map(math.prod, shapes)) == 10**6 and set(group_N) == set(range(16)) and len(shapes) == len(group_N)
    moved = {case.name: case.bytes_moved(case.make(10**5, "cpu")[0]) / 10**5 for case in CASES}
    assert moved == {
        "encode fp32": 16, "encode bf16": 8, "delta fp32 K=1": 12, "delta fp32 K=4": 24, "delta bf16 K=1": 6,
    }  # fmt: skip


def test_ratio_is_a_share_of_the_copy(monkeypatch):
    spent = {"scale": 4.0, "torch._foreach": 8.0, "reference": 8.0, "copy": 2.0}
    order = [*spent.values()] * 3
    monkeypatch.setattr(shards_kernel, "seconds", lambda run, device, flush: order.pop(0))
    rows = {(row.metric, row.provider): row for row in measure(CASES[2], 10**5, 3, "cpu")}
    assert rows["bandwidth", "scale"].ratio == 0.5 and rows["time", "scale"].ratio == 0.5
    assert rows["bandwidth", "scale"].median == pytest.approx(12e5 / 4 / 1e9)
