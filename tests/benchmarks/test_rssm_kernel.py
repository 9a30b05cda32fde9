"""The RSSM benchmark at toy sizes: its gate, its rows, and the loops that only a GPU times."""

from __future__ import annotations

import pytest
import torch
from scale_kernels.rssm.reference import rollout_reference, teacher_forced
from torch import nn

from benchmarks import rssm_kernel, rssm_providers
from benchmarks.common import read_csv
from benchmarks.rssm_work import Case, differences, make

SMALL = ["--hidden", "16", "--paths", "1", "2", "--horizon", "3", "--rounds", "3", "--threads", "1"]
CASE = Case(16, 4, 3, 2, 5)
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's part")


@on_cpu
def test_rows_and_plot(tmp_path, capsys):
    out = tmp_path / "rssm.csv"
    assert rssm_kernel.main([*SMALL, "--providers", "scale", "--out", str(out), "--plot"]) == 0
    rows = read_csv(out)
    assert [(row["provider"], row["x"], row["n"]) for row in rows] == [
        (name, x, "3") for x in "12" for name in ("reference", "scale")
    ]
    assert rows[0]["unit"] == "us/step" and rows[0]["config"] == "hidden 16; horizon 3; members 5; threads 1"
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert "no GPU: reference and compiled only" in capsys.readouterr().out


@on_cpu
@pytest.mark.parametrize("spoil", [1.001, float("nan")])
def test_no_speed_where_the_gate_fails(spoil, tmp_path, capsys, monkeypatch):
    def wrong(given):
        outputs, h, z = rollout_reference(*given)
        return lambda: (outputs, h, z * spoil)

    monkeypatch.setitem(rssm_providers.ON_GPU, "scale", wrong)
    out = tmp_path / "rssm.csv"
    assert rssm_kernel.main([*SMALL, "--providers", "scale", "--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "scale at Case(hidden=16" in printed.err and "us/step" not in printed.out and not out.exists()


@on_cpu
def test_what_needs_a_gpu_is_refused_without_one(capsys):
    with pytest.raises(SystemExit):
        rssm_kernel.main([*SMALL, "--providers", "graph_grucell"])
    assert "needs a GPU" in capsys.readouterr().err


@torch.no_grad()
def test_loop_of_cells_does_the_rollout():
    given = make(CASE)
    assert max(differences(rssm_providers.grucell_loop(given), rollout_reference(*given))) < 1e-13


@torch.no_grad()
def test_networks_over_known_inputs_get_the_latents_of_the_rollout():
    given = make(CASE)
    latents = rssm_kernel.latents(given)
    assert torch.equal(latents[-1], rollout_reference(*given)[2])
    (hidden,), (again,) = (run() for run in rssm_providers.known_inputs(given, latents, nn.GRU))
    h_last = teacher_forced(*given[:4], latents)[1]
    assert max(differences((hidden[-1], again[-1]), (h_last, h_last))) < 1e-13
    (lstm,), (right,) = (run() for run in rssm_providers.known_inputs(given, latents, nn.LSTM))
    assert lstm.shape == hidden.shape and torch.equal(lstm, right)


@pytest.mark.slow
@torch.no_grad()
def test_compiled_step():
    given = make(CASE, dtype=torch.float32)
    assert max(differences(rssm_providers.compiled(given)(), rollout_reference(*given))) < 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_every_provider_on_a_gpu(tmp_path):
    out = tmp_path / "rssm.csv"
    assert rssm_kernel.main([*SMALL, "--out", str(out)]) == 0
    names = [*rssm_providers.ON_GPU, *rssm_providers.KNOWN_INPUTS]
    assert {row["provider"] for row in read_csv(out)} == set(names)
