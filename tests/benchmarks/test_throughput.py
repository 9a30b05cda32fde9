"""Throughput of one GPU, at toy sizes on a CPU: the gate, every provider, what is recorded where nothing was measured."""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_loops, throughput
from benchmarks.common import FIELDS, read_csv
from benchmarks.gpu_loops import PROVIDERS, TITAN, titan_loss, titan_model
from benchmarks.gpu_work import Cell, Rows, Settings, make_work
from benchmarks.loops import plain_loop, summed_loss, training_arguments
from benchmarks.throughput_rows import OUT_OF_MEMORY, Result, rows_of
from scale.hardware import installed

TINY = throughput.settings_of(throughput.parse(["--tiny", "--out", "unused"]))
BARE = Cell("bare", "tiny", 64, "packed", "bf16")


@pytest.mark.parametrize("provider", ["scale", "bare", "huggingface"])
def test_every_provider_passes_the_gate_and_is_timed(provider):
    outcome = throughput.measure(replace(BARE, provider=provider), TINY)
    assert outcome["status"] == "ok" and len(outcome["seconds"]) == TINY.steps and min(outcome["seconds"]) > 0
    assert outcome["tokens"] == 2 * 2 * 64 and len(outcome["losses"]) == TINY.warm_up + TINY.steps + 1


@pytest.mark.parametrize("precision", ["fp8", "fp8 rowwise"])
def test_fp8_is_compared_with_fp8(precision):
    pytest.importorskip("torchao")
    fp8 = throughput.measure(replace(BARE, provider="scale", precision=precision), TINY)
    assert fp8["status"] == "ok"
    assert fp8["losses"][0] != throughput.measure(replace(BARE, provider="scale"), TINY)["losses"][0]


def wrong_data(work, folder):
    return PROVIDERS["scale"](replace(work, groups=work.groups[::-1]), folder)


def wrong_normalisation(work, folder):
    return plain_loop(work, work.model(), lambda *given: summed_loss(*given) * 1.001)


def wrong_learning_rate(work, folder):
    config = work.config.model_copy(update={"optim": work.config.optim.model_copy(update={"lr": 1e-2})})
    return gpu_loops.bare(replace(work, config=config), folder)


@pytest.mark.parametrize("broken", [wrong_data, wrong_normalisation, wrong_learning_rate])
def test_no_speed_where_the_gate_fails(broken, monkeypatch):
    monkeypatch.setitem(PROVIDERS, "bare", broken)
    outcome = throughput.measure(BARE, TINY)
    assert outcome["status"].startswith("wrong losses: ") and "seconds" not in outcome
    (row,) = rows_of([Result(BARE, outcome)], TINY)
    assert row.metric == "not measured" and row.unit.startswith("wrong losses") and row.n == 0


def test_whole_run_in_processes_of_their_own(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(throughput, "MORE", [])
    out = tmp_path / "out"
    code = throughput.main(["--tiny", "--out", str(out), "--layouts", "packed", "--providers", "bare", TITAN])
    shown = capfd.readouterr().out
    assert code == 0 and "over bare" in shown
    rows = read_csv(out / "throughput.csv")
    assert list(rows[0]) == FIELDS and {row["benchmark"] for row in rows} == {"throughput"}
    first = [row for row in rows if row["provider"] == "bare" and "; bf16;" in row["config"]]
    by = {row["metric"]: row for row in first}
    assert set(by) == {"throughput", "mfu", "parameters", "first_loss_difference"}
    assert float(by["throughput"]["ratio"]) == 1 and by["throughput"]["n"] == str(TINY.steps)
    assert 0 < float(by["throughput"]["q20"]) <= float(by["throughput"]["median"])
    assert float(by["parameters"]["median"]) == 119_104 and 0 < float(by["mfu"]["median"]) < 1
    titan = next(row for row in rows if row["provider"] == TITAN)
    assert titan["metric"] == "not measured" and titan["median"] == "nan"


def outcomes(statuses, budget=1000.0, cells=(BARE,)):
    """What `measure_all` records when configurations end so, in turn."""
    waiting, kept = iter(statuses), []
    end = time.monotonic() + budget
    throughput.measure_all(list(cells), TINY, end, lambda *_: {"status": next(waiting)}, lambda r: kept.append([*r]))
    return [(result.cell, result.outcome["status"]) for result in kept[-1]]


def test_out_of_memory_is_recorded_and_tried_again_with_recompute():
    again = replace(BARE, recompute="auto")
    assert outcomes([OUT_OF_MEMORY, "ok", "ok"], cells=[BARE, replace(BARE, seq_len=32)]) == [
        (BARE, OUT_OF_MEMORY), (again, "ok"), (replace(BARE, seq_len=32), "ok")
    ]  # fmt: skip
    assert outcomes([OUT_OF_MEMORY] * 2) == [(BARE, OUT_OF_MEMORY), (again, OUT_OF_MEMORY)]


def test_what_the_budget_leaves_no_time_for_is_recorded():
    assert outcomes([], budget=1.0) == [(BARE, "not run: no time left")]


def test_imports_count_in_the_budget(tmp_path):
    """A process that began long ago has no time left."""
    ran = []
    asked = ["--tiny", "--out", str(tmp_path), "--layouts", "packed", "--providers", "bare"]
    throughput.main(asked, run=lambda *_: ran.append(1), began=time.monotonic() - 1800)
    assert not ran and {row["unit"] for row in read_csv(tmp_path / "throughput.csv")} == {"not run: no time left"}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory")])
def test_an_error_of_memory_is_told_apart_from_others(error, monkeypatch):
    def fails(work, folder):
        raise error

    monkeypatch.setitem(PROVIDERS, "bare", fails)
    assert throughput.measure(BARE, TINY) == {"status": OUT_OF_MEMORY}
    monkeypatch.setitem(PROVIDERS, "bare", lambda work, folder: [][1])
    with pytest.raises(IndexError):
        throughput.measure(BARE, TINY)


def test_scale_never_halves_the_micro_batch_by_itself(monkeypatch):
    """It would be timed as another configuration."""
    calls = []

    def short_of_memory(self, group):
        calls.append(group)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("scale.train.step.BackwardStepper._gradients", short_of_memory)
    assert throughput.measure(replace(BARE, provider="scale"), TINY) == {"status": OUT_OF_MEMORY} and len(calls) == 1


def test_a_child_that_dies_or_hangs_ends_alone():
    cell = replace(BARE, model="none")
    assert throughput.in_a_process_of_its_own(cell, TINY, 120)["status"] == "failed (1): KeyError: 'none'"
    assert throughput.in_a_process_of_its_own(BARE, TINY, 0.5)["status"] == "not run to its end: no time left"


def test_a_child_ends_with_a_parent_that_is_killed(tmp_path):
    """Or it would keep the GPU."""
    code = """if True:
        import sys
        from benchmarks.child import run_child
        run_child(["sh", "-c", "echo $$ >" + sys.argv[1] + "; exec sleep 300"], 300)
    """
    named, deadline = tmp_path / "child", time.monotonic() + 300
    parent = subprocess.Popen([sys.executable, "-c", code, str(named)])
    while not (named.exists() and named.read_text().strip()):
        assert parent.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    child = Path(f"/proc/{named.read_text().strip()}/stat")
    while child.exists() and child.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline, "the child goes on"
        time.sleep(0.02)


def test_hugging_face_does_not_change_products_in_fp32(tmp_path, monkeypatch):
    """As on a GPU that has TF32."""
    monkeypatch.setattr("transformers.training_args.is_torch_tf32_available", lambda: True)
    before = torch.backends.fp32_precision
    work = replace(make_work(BARE, TINY), compile="default")
    assert training_arguments(work, tmp_path).torch_compile
    assert torch.backends.fp32_precision == before and torch.get_float32_matmul_precision() == "highest"


def test_the_most_important_come_first_and_all_come():
    cells = throughput.cells_of(throughput.parse([]))
    assert len(set(cells)) == len(cells) == 2 * 2 * 2 * 7
    assert [(c.provider, c.precision, c.model, c.seq_len, c.layout) for c in cells[:5]] == [
        ("scale", "bf16", "1b", 4096, "packed"), ("bare", "bf16", "1b", 4096, "packed"),
        ("scale", "bf16", "8b", 8192, "packed"), ("bare", "bf16", "8b", 8192, "packed"),
        ("scale", "fp8", "1b", 4096, "packed"),
    ]  # fmt: skip


def test_ratios_by_hand():
    def result(provider, precision, *seconds):
        outcome = {"status": "ok", "tokens": 100, "seconds": [*seconds], "flops_per_token": 3.0, "peak_flops": 1e4}
        outcome |= {"parameters": 7, "differences": [1e-5], "peak_bytes": 2**31, "attention": "sdpa"}
        return Result(replace(BARE, provider=provider, precision=precision), outcome)

    rows = rows_of(
        [result("scale", "bf16", 0.5, 0.5), result("bare", "bf16", 1.0, 1.0), result("scale", "fp8", 0.25)], TINY
    )
    found = {(r.provider, r.config.split("; ")[2], r.metric): r for r in rows}
    assert found["scale", "bf16", "throughput"].median == 200 and found["scale", "bf16", "throughput"].ratio == 2
    assert found["scale", "bf16", "mfu"].median == pytest.approx(0.06)
    assert found["scale", "fp8", "fp8_over_bf16"].median == 2 and found["scale", "fp8", "throughput"].ratio == 4
    assert found["bare", "bf16", "peak_memory"].median == 2
    assert ("bare", "bf16", "fp8_over_bf16") not in found


def test_rows_are_those_of_packed_documents():
    batch = Rows(512, 256, "packed").batch(4)
    ids, targets, positions, segments = (batch[n] for n in ("input_ids", "targets", "position_ids", "segment_ids"))
    assert torch.equal(ids[:, 1:], targets[:, :-1]) and ids.max() < 512 and (positions[:, 0] == 0).all()
    later = positions[:, 1:] != 0
    assert torch.equal((positions[:, 1:] - positions[:, :-1])[later], torch.ones(int(later.sum()), dtype=torch.long))
    assert torch.equal((~later).sum(1), segments[:, -1]) and segments.max() > 0
    assert Rows(512, 256, "whole").batch(2)["segment_ids"].max() == 0
    one = Rows(512, 256, "packed", one_row=True).batch(4)
    assert torch.equal(one["position_ids"], positions.view(1, -1))


@pytest.mark.skipif(not installed("torchtitan"), reason="torchtitan is not installed")
def test_torchtitan_computes_the_same_loss_from_the_same_weights():
    work = replace(make_work(BARE, TINY), precision="fp32")
    given = [work.groups[0].batches[0][name] for name in ("input_ids", "position_ids", "targets")]
    with torch.no_grad():
        right, found = summed_loss(work, work.model(), *given), titan_loss(work, titan_model(work), *given)
    torch.testing.assert_close(found, right, rtol=1e-5, atol=0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_or_written(tmp_path, capsys):
    assert throughput.main(["--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == "no GPU: nothing was measured\n" and not (tmp_path / "out").exists()


def test_settings_of_a_gpu_keep_enough_steps_for_the_gate():
    assert throughput.settings_of(throughput.parse(["--steps", "1"])) == replace(Settings(), steps=3)
