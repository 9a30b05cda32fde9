"""What the launcher refuses before it starts a rank: one line, exit code 2, nothing left."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from scale.cluster.supervise import main
from tests.conftest import tiny_run
from tests.distributed.harness import ROOT


@pytest.mark.parametrize(
    ("words", "environment", "fragments"),
    [
        pytest.param(
            ["--ranks-per-node", "3"], {}, ["do not divide among 3 ranks", "batch.sequences=6 or 9"], id="rows"
        ),
        pytest.param(["--port", "80x"], {}, ["80x"], id="no port"),
        pytest.param([], {"MASTER_PORT": "99999"}, ["99999", "1 to 65529"], id="port too high"),
        pytest.param(["runs_dir=FILE/runs"], {}, ["runs_dir = ", "is not a folder"], id="runs below a file"),
    ],
)
def test_launcher(tmp_path: Path, words: list[str], environment: dict[str, str], fragments: list[str]) -> None:
    config, file = tmp_path / "run.yaml", tmp_path / "file"
    config.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    file.touch()
    words = [word.replace("FILE", str(file)) for word in words]
    done = subprocess.run(
        ["bash", "launch/torchrun.sh", "--ranks-per-node", "2", str(config), *words],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("scale: error:") or ": error:" in line
    assert all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without")
@pytest.mark.parametrize(
    ("words", "environment", "fragments"),
    [
        (["--gpus", "2"], {}, ["--gpus 2: this machine shows 0 GPUs to torch"]),
        (["--gpus", "2"], {"CUDA_VISIBLE_DEVICES": ""}, ["shows 0 GPUs to torch, CUDA_VISIBLE_DEVICES = ''"]),
        (["--gpus", "2", "compute.device=cpu"], {}, ["--gpus 2: but compute.device = 'cpu'"]),
        (["--gpus", "2", "--ranks-per-node", "2"], {}, ["say one of them"]),
        ([], {"GPUS_PER_NODE": "2"}, ["GPUS_PER_NODE = 2: this machine shows 0"]),
        ([], {"SLURM_GPUS_ON_NODE": "4"}, ["SLURM_GPUS_ON_NODE = 4: this machine shows 0"]),
        ([], {}, ["shows no GPU to torch; for processes on CPUs say how many"]),
    ],
)
def test_gpus_that_are_not_there(
    tmp_path: Path, words: list[str], environment: dict[str, str], fragments: list[str], capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main([str(config), *words], environment) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("scale: error: ") and all(fragment in line for fragment in fragments), line
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("environment", "fragment"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE = 2 in the environment, but not RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "5", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, "RANK = 5"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "MASTER_PORT = 'x' is no port",
        ),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE = 'two'"),
    ],
)
def test_environment_of_a_rank(tmp_path: Path, environment: dict[str, str], fragment: str) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_run(tmp_path)))
    done = subprocess.run(
        [sys.executable, "-m", "scale.cli.main", "train", str(config)],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )
    lines = [line for line in done.stderr.splitlines() if "error" in line]
    assert done.returncode == 2 and len(lines) == 1 and fragment in lines[0], done.stderr
