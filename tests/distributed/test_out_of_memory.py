"""Real memory runs out on several ranks: the launcher starts them again with smaller micro-batches, and the losses stay."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import metrics_of, tiny_run
from tests.distributed.harness import ROOT, train

MEMORY = 900 << 20
"""Bytes of private memory that each process may have: enough for a few of the 32 rows of a micro-batch."""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_launcher_halves_micro_batches_until_they_fit(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, train={"steps": 2}, batch={"sequences": 64, "micro": 32})
    run["data"]["seq_len"] = 2048
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(run))
    train(path, 1, "name=roomy", "batch.micro=4")
    launched = subprocess.run(
        ["bash", "launch/torchrun.sh", "--ranks-per-node", "2", str(path)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=800,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY)),
    )
    assert launched.returncode == 0, launched.stderr[-3000:]
    assert "out of memory" in launched.stderr and "micro-batches split by 2" in launched.stderr
    tight, roomy = (metrics_of(tmp_path / "runs" / name) for name in ("tiny", "roomy"))
    assert [row["loss"] for row in tight[1:]] == pytest.approx([row["loss"] for row in roomy[1:]], rel=1e-5)
