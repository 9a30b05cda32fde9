"""Training in a real cluster of two nodes: what stops it in the middle leaves no trace in the metrics."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.slurm.harness import ROOT, Cluster, Fields
from tests.conftest import metrics_of, tiny_run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

STEPS = 160
IN_THE_MIDDLE = 15  # steps after which runs are disturbed


class Place:
    """A config in a folder of its own, and jobs that train it."""

    def __init__(self, cluster: Cluster, folder: Path):
        self.cluster, self.folder, self.config = cluster, folder, folder / "run.yaml"
        every = {"checkpoint": {"every": 10, "keep_last": 2, "keep_best": 0}, "eval": {"every": 50, "tokens": 1024}}
        self.config.write_text(yaml.safe_dump(tiny_run(folder, train={"steps": STEPS}, **every)))

    def submit(self, name: str, *overrides: str, python: str = sys.executable) -> int:
        env = {
            "SCALE_HOME": str(ROOT),
            "SCALE_CONFIG": str(self.config),
            "SCALE_RANKS_PER_NODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        options = ["--gpus-per-node=0", f"--output={self.folder / name}.out", f"--chdir={self.folder}"]
        script = ROOT / "slurm" / "pretrain_7b.sh"
        return self.cluster.sbatch(*options, script, f"name={name}", *overrides, PYTHON=python, **env)

    def reach_the_middle(self, name: str, job: int) -> None:
        metrics, deadline = self.folder / "runs" / name / "metrics.jsonl", time.monotonic() + 400
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < IN_THE_MIDDLE:
            assert time.monotonic() < deadline, self.cluster.report(self.cluster.job(job))
            time.sleep(0.05)

    def finish(self, job: int) -> Fields:
        return self.cluster.wait_until(job, lambda fields: fields["JobState"] == "COMPLETED")

    def metrics(self, name: str) -> list[dict[str, Any]]:
        return metrics_of(self.folder / "runs" / name)

    def output(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()


@pytest.fixture(scope="module")
def place(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(cluster, tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def undisturbed(place: Place) -> list[dict[str, Any]]:
    """Metrics of an uninterrupted job on both nodes."""
    fields = place.finish(place.submit("whole"))
    assert fields["Restarts"] == "0" and fields["NumNodes"] == "2"
    assert "fsdp (2 ranks)" in place.output("whole")
    return place.metrics("whole")


def test_two_nodes_train_as_one_process_does(place, undisturbed):
    command = [sys.executable, "-m", "scale.cli.main", "train", str(place.config), "name=alone", "compute.threads=1"]
    subprocess.run(
        command,
        check=True,
        capture_output=True,
        timeout=200,
        cwd=place.folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    alone = place.metrics("alone")
    assert [row["step"] for row in undisturbed] == [row["step"] for row in alone] and len(alone) >= STEPS
    for key in ("loss", "val_loss", "gradient_norm"):
        two, one = ([row[key] for row in rows if row[key] is not None] for rows in (undisturbed, alone))
        assert two == pytest.approx(one, rel=1e-5), key


@pytest.mark.parametrize("name, how", [("script", ["--batch", "--signal=USR1"]), ("ranks", ["--signal=TERM"])])
def test_a_signal_requeues(name, how, place, cluster, undisturbed):
    """USR1 to the script as near the time limit; TERM to all processes of the ranks as at preemption by default."""
    job = place.submit(name)
    place.reach_the_middle(name, job)
    cluster.run("scancel", *how, str(job))
    assert place.finish(job)["Restarts"] == "1"
    assert "resumed from" in place.output(name)
    assert place.metrics(name) == undisturbed


def test_preemption_requeues(place, cluster, undisturbed):
    job = place.submit("preempted")
    place.reach_the_middle("preempted", job)
    high = cluster.sbatch("--partition=high", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    cluster.wait_for(high, "RUNNING", "COMPLETED")
    assert place.finish(job)["Restarts"] == "1"
    assert "resumed from" in place.output("preempted")
    assert place.metrics("preempted") == undisturbed


@pytest.mark.parametrize("node", ["n0", "n1"])
def test_a_dead_node_requeues(node, place, cluster, undisturbed):
    """n0 runs the batch script, so that Slurm itself has to requeue the job; n1 is missed by the script."""
    name = f"without_{node}"
    job = place.submit(name)
    place.reach_the_middle(name, job)
    cluster.kill_node(node)
    if node == "n0":
        cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=dead")
    cluster.wait_until(job, lambda fields: fields["JobState"] != "RUNNING")
    cluster.start_node(node)
    if node == "n0":
        cluster.run("scontrol", "update", f"nodename={node}", "state=resume")
    assert int(place.finish(job)["Restarts"]) >= 1
    assert "resumed from" in place.output(name)
    assert place.metrics(name) == undisturbed


def test_a_wrong_config_ends_with_2(place, cluster):
    job = place.submit("wrong", "optim.lr=fast")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0")
    assert "optim.lr" in place.output("wrong") and "preflight" not in place.output("wrong")


def test_data_that_does_not_fit_ends_with_2(place, cluster):
    """What only the ranks can find out."""
    job = place.submit("short", "model.overrides.vocab_size=7")
    fields = cluster.wait_for(job, "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "2:0", "0"), place.output("short")


OTHER_TORCH = """#!/bin/sh
[ "$SLURMD_NODENAME" = n0 ] || export PYTHONPATH="{folder}"
exec {python} "$@"
"""


def test_the_preflight_names_a_bad_rank(place, cluster, tmp_path):
    """Node n1 has another version of torch, as far as its metadata says."""
    record = tmp_path / "torch-0.1.dist-info" / "METADATA"
    record.parent.mkdir()
    record.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 0.1\n")
    python = tmp_path / "python"
    python.write_text(OTHER_TORCH.format(folder=tmp_path, python=sys.executable))
    python.chmod(0o755)
    fields = cluster.wait_for(place.submit("unfit", python=str(python)), "COMPLETED", "FAILED")
    assert (fields["JobState"], fields["ExitCode"], fields["Restarts"]) == ("FAILED", "1:0", "0")
    complaints = [line for line in place.output("unfit").splitlines() if line.startswith("preflight: rank")]
    assert len(complaints) == 1 and "rank 1" in complaints[0] and "torch" in complaints[0], place.output("unfit")
    assert not (place.folder / "runs" / "unfit").exists()
