"""Whole runs on a GPU: killed and continued, and their memory beside the plan's."""

import signal
import subprocess
import sys
import time

import pytest
import torch

from benchmarks import gpu_work
from benchmarks.gpu_loops import scale_stepper
from benchmarks.gpu_work import Cell, Settings, make_work
from benchmarks.loops import Watched
from scale.hardware import detect
from scale.models.size import model_size
from scale.plan.plan import measure
from scale.plan.settle import settle
from tests.conftest import metrics_of, tiny_run
from tests.gpu import DEVICE, GPU, only_cuda
from tests.gpu.parts import peak_memory
from tests.plan.real import MIDDLE

pytestmark = GPU
STEPS = 300


def start(config, name):
    command = [sys.executable, "-m", "scale.cli.main", "train", str(config), f"name={name}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out[-3000:]


def test_a_killed_run_goes_on_bit_for_bit(make_config, tmp_path, monkeypatch):
    """With dropout, so that the GPU's random numbers count. Eager attention: its backward pass adds up in one order."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    compute = {"device": DEVICE, "precision": "bf16", "compile": "off", "attention": "eager", "kernels": "off"}
    model = tiny_run(tmp_path)["model"]
    model["overrides"] |= {"attention_dropout": 0.1}
    config = make_config(
        compute=compute,
        model=model,
        train={"steps": STEPS},
        checkpoint={"every": 5},
        eval={"every": 150, "tokens": 512},
    )
    finish(start(config, "whole"))
    killed = start(config, "killed")
    path, deadline = tmp_path / "runs" / "killed" / "metrics.jsonl", time.monotonic() + 100
    while not path.exists() or path.read_bytes().count(b"\n") < 12:
        assert killed.poll() is None and time.monotonic() < deadline, killed.communicate()[0][-3000:]
        time.sleep(0.001)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert path.read_bytes().count(b"\n") < STEPS
    finish(start(config, "killed"))
    whole = metrics_of(tmp_path / "runs" / "whole")
    assert metrics_of(path.parent) == whole and len(whole) == STEPS + 1


@only_cuda
def test_a_plan_foresees_the_peak_within_a_tenth(monkeypatch):
    """Eager, as a plan is; flex attention keeps what the plan's attention keeps. Half of the memory is activations."""
    monkeypatch.setattr(gpu_work, "TINY", MIDDLE)
    settings = Settings(compile="off", attention="flex_attention", kernels="off", micro=8192, warm_up=0, steps=2)
    work = make_work(Cell("scale", "tiny", 2048, "packed", "bf16"), settings)

    def train():
        stepper, source = scale_stepper(work), Watched(iter(work.groups).__next__, work.clock())
        for _ in work.groups:
            stepper.step(source)

    _, taken = peak_memory(train)
    torch.cuda.empty_cache()
    settled = settle(work.config, 1, detect("cuda"))
    planned = measure(settled, model_size(settled.model.module), lambda text: None).peak
    assert planned == pytest.approx(taken, rel=0.1)
