"""The actor of one rank without a cluster."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.harness import ROOT

pytest.importorskip("ray")
ACTOR = """
import sys
from pathlib import Path
from scale.cluster.ray_actor import RankActor, Task
run = Path(sys.argv[1])
rank = "import os; open(os.environ['TORCH_FR_DUMP_TEMP_FILE'] + '1', 'w').write('trace')"
actor = RankActor()
result = actor.run(Task(1, ["-c", rank], {}, "127.0.0.1", 1, run / "logs" / "now", run))
assert result.exit_code == 0, next(actor.private.glob("*.log")).read_text()
actor.clean()
"""


@pytest.mark.parametrize("exists", [True, False])
def test_the_flight_recorder_can_write(tmp_path: Path, exists: bool) -> None:
    """As NCCL does: a file in a folder that must be there."""
    run = tmp_path / "run"
    if exists:
        run.mkdir()
    names = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    command = [sys.executable, "-c", ACTOR, str(run)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert run.exists() == exists
    assert not exists or (run / "logs" / "now" / "nccl_trace_rank_1").read_text() == "trace"
