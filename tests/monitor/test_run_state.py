"""run_state.json: complete, strict both ways, and cut back on resume."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from scale.errors import ScaleError
from scale.monitor.records import Metrics
from scale.monitor.run_state import RunState, read_git, read_gpu
from scale.protocols import Score, StepKind, StepReport

PROMISED = {
    *("run_id", "run_name", "status", "config_hash", "started_at", "updated_at", "ended_at", "step", "loss", "phase"),
    *("total_forward", "total_backward", "best_val_loss", "best_val_step", "error_message", "latest_checkpoint"),
    *("checkpoints", "phase_transitions", "gpu_memory_used", "gpu_temperature", "gpu_power", "gpu_utilisation"),
    *("steps_per_second", "tokens_per_second", "git_commit", "git_branch", "facts", "events"),
}


def report(step: int, kind: StepKind, loss: float) -> StepReport:
    return StepReport(step, kind, loss, 1.0, 1e-3, 100, 2, 1, 100, 50, 0.25)


def rows(tmp_path: Path) -> list[dict[str, Any]]:
    metrics = Metrics(tmp_path / "m")
    plan: list[tuple[int, StepKind, float | None]] = [(1, "full", 5.0), (2, "full", None), (3, "predict", 4.0)]
    plan += [(4, "full", 3.0), (5, "full", float("nan")), (6, "correct", 3.5)]
    start = metrics.score_row(0, Score(9.0, 1), {})
    return [start] + [metrics.row(report(s, k, 1.0 * s), Score(v, 1) if v else None, {}) for s, k, v in plan]


def test_it_follows_the_rows_and_loads_again(tmp_path: Path) -> None:
    state = RunState("demo", "abc", facts={"steps": 6, "share": float("nan")}, git_branch="main")
    for row in rows(tmp_path):
        state.observe(row)
    state.note("resume", "resumed from step 3")
    state.checkpoints, state.latest_checkpoint = ["step_00000003"], "step_00000003"
    state.end("failed", "disk full")
    path = tmp_path / "run_state.json"
    state.save(path)
    assert set(json.loads(path.read_text())) >= PROMISED
    assert "NaN" not in path.read_text()
    again = RunState.load(path)
    state.facts["share"] = None
    assert again == state
    assert (again.step, again.loss, again.phase) == (6, 6.0, "correct")
    assert (again.best_val_loss, again.best_val_step) == (3.0, 4)
    assert (again.total_forward, again.total_backward) == (12, 6)
    assert (again.steps_per_second, again.tokens_per_second) == (4.0, 400.0)
    moves = [(t.step, t.phase) for t in again.phase_transitions]
    assert moves == [(1, "full"), (3, "predict"), (4, "full"), (6, "correct")]
    assert (again.status, again.error_message, again.events[0].kind) == ("failed", "disk full", "resume")
    assert again.ended_at is not None


def test_resume_forgets_what_came_after_the_checkpoint(tmp_path: Path) -> None:
    state = RunState("demo", "abc")
    for row in rows(tmp_path):
        state.observe(row)
    state.end("failed", "killed")
    state.resume(3, rows(tmp_path)[:4])
    assert (state.step, state.phase, state.status, state.error_message) == (3, "predict", "running", None)
    assert (state.best_val_loss, state.best_val_step, state.total_forward) == (4.0, 3, 6)
    assert [(t.step, t.phase) for t in state.phase_transitions] == [(1, "full"), (3, "predict")]
    state.observe(rows(tmp_path)[4])
    assert [(t.step, t.phase) for t in state.phase_transitions][-1] == (4, "full")


def test_phases_that_alternate_for_ever_do_not_fill_the_file(tmp_path: Path) -> None:
    state, metrics = RunState("demo", "abc"), Metrics(tmp_path / "m")
    for step in range(1, 1203):
        state.observe(metrics.row(report(step, "predict" if step % 2 else "full", 1.0), None, {}))
    assert [t.step for t in state.phase_transitions] == list(range(203, 1203))


def test_events_that_come_every_step_do_not_fill_the_file_nor_drive_out_the_others(tmp_path: Path) -> None:
    state = RunState("demo", "abc")
    state.note("resume", "resumed from step 3")
    for step in range(1, 1203):
        state.step = step
        state.note("skipped_step", f"step {step} skipped")
    kept = [event.step for event in state.events if event.kind == "skipped_step"]
    assert kept == list(range(1003, 1203)) and state.events[0].kind == "resume"
    assert state.events_left_out == {"skipped_step": 1002}
    state.save(tmp_path / "run_state.json")
    assert RunState.load(tmp_path / "run_state.json") == state


def test_a_run_state_of_an_older_version_loads(tmp_path: Path) -> None:
    path = tmp_path / "run_state.json"
    RunState("demo", "abc").save(path)
    body = json.loads(path.read_text())
    del body["events_left_out"]
    path.write_text(json.dumps(body))
    assert RunState.load(path).events_left_out == {}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"step": "3"}, "step"),
        ({"status": "odd"}, "status"),
        ({"version": 2}, "version"),
        ({"surprise": 1}, "surprise"),
        ({"events": [{"step": 1}]}, r"events\.0\.kind"),
        ({"checkpoints": [3]}, r"checkpoints\.0"),
        ({"best_val_loss": True}, "best_val_loss"),
    ],
)
def test_anything_unexpected_is_refused_by_name(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    path = tmp_path / "run_state.json"
    RunState("demo", "abc").save(path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ScaleError, match=rf"run_state\.json: {field}:"):
        RunState.load(path)


def test_missing_fields_and_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "run_state.json"
    with pytest.raises(ScaleError, match="No such file"):
        RunState.load(path)
    RunState("demo", "abc").save(path)
    body = json.loads(path.read_text())
    body.pop("gpu_power")
    path.write_text(json.dumps(body))
    with pytest.raises(ScaleError, match="gpu_power is missing"):
        RunState.load(path)
    for text in ("", "[]", "{", "3", "\xff"):
        path.write_text(text, encoding="latin-1")
        with pytest.raises(ScaleError, match=r"run_state\.json"):
            RunState.load(path)


def test_git_facts(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        user = ["-c", "user.name=a", "-c", "user.email=a@b"]
        command = ["git", "-C", str(tmp_path), *user, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    nothing = {"git_commit": None, "git_branch": None}
    assert read_git(tmp_path) == nothing
    git("init", "-b", "work")
    assert read_git(tmp_path) == nothing
    git("commit", "--allow-empty", "-m", "first")
    assert read_git(tmp_path) == {"git_commit": git("rev-parse", "HEAD"), "git_branch": "work"}
    git("checkout", "--detach")
    assert read_git(tmp_path)["git_branch"] is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
def test_no_gpu_is_null() -> None:
    assert read_gpu() and set(read_gpu().values()) == {None}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_gpu_readings() -> None:
    found = read_gpu()
    assert 0 < found["gpu_memory_used"] < found["gpu_memory_total"]
