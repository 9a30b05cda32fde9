"""Trackers get every number; one that breaks is reported once and never stops a run."""

import json
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from scale.config.run import WandbConfig
from scale.errors import MissingExtra, UsageError
from scale.monitor import trackers
from scale.monitor.recorder import RunRecorder
from scale.monitor.records import Metrics
from scale.monitor.run_folder import RunFolder
from scale.monitor.trackers import Guarded, TensorBoard, Wandb, numbers
from scale.protocols import StepReport


def row(step: int, loss: float = 2.5) -> dict[str, Any]:
    report = StepReport(step, "full", loss, 1.0, 3e-4, 2048, 1, 1, 2048, 2048, 0.5, layer_gradients={"a.b": 0.5})
    return Metrics(Path("unused")).row(report, None, {})


class Breaks:
    """Raises in its third log, in start or in finish."""

    name = "fragile"

    def __init__(self, where: str, error: BaseException):
        self.where, self.error, self.calls = where, error, list[str]()

    def start(self, facts: Mapping[str, Any]) -> None:
        self._call("start")

    def log(self, row: Mapping[str, Any]) -> None:
        self._call("log" if self.calls.count("log") < 2 else "third log")

    def finish(self, status: str) -> None:
        self._call("finish")

    def _call(self, what: str) -> None:
        self.calls.append(what)
        if what == self.where:
            raise self.error


def drive(guarded: Guarded) -> None:
    guarded.start({})
    for step in range(1, 6):
        guarded.log(row(step))
    guarded.finish("completed")


def test_a_monitor_that_raises_in_the_middle_is_told_once_and_let_go() -> None:
    said: list[str] = []
    monitor = Breaks("third log", ConnectionError("server\n  gone"))
    drive(Guarded(monitor, said.append))
    assert said == ["monitor.fragile: off for the rest of the run: ConnectionError: server gone"]
    assert monitor.calls == ["start", "log", "log", "third log", "finish"]


def test_a_failing_finish_is_told_too() -> None:
    said: list[str] = []
    drive(Guarded(Breaks("finish", ValueError("x")), said.append))
    assert said == ["monitor.fragile: off for the rest of the run: ValueError: x"]


def test_a_failing_start_stops_the_run_in_one_line() -> None:
    with pytest.raises(UsageError, match=r"^monitor\.fragile: cannot start: OSError: no\s+route .*$") as caught:
        drive(Guarded(Breaks("start", OSError("no\nroute"))))
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=r"^as it is$"):
        drive(Guarded(Breaks("start", UsageError("as it is"))))


def test_a_service_that_is_down_does_not_end_a_run_that_goes_on() -> None:
    said: list[str] = []
    guarded = Guarded(Breaks("start", OSError("no route")), said.append)
    guarded.start({"step": 5})
    guarded.log(row(6))
    guarded.finish("completed")
    assert said == ["monitor.fragile: off for the rest of the run: OSError: no route"]
    with pytest.raises(UsageError, match=r"^as it is$"):
        Guarded(Breaks("start", UsageError("as it is"))).start({"step": 5})


def test_a_stop_request_is_not_swallowed() -> None:
    with pytest.raises(KeyboardInterrupt):
        drive(Guarded(Breaks("third log", KeyboardInterrupt())))


class Hangs(Breaks):
    """Never finishes."""

    def finish(self, status: str) -> None:
        self.forever = threading.Event()
        self.forever.wait()


def test_a_monitor_that_does_not_finish_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(trackers, "LEAVE_SECONDS", 0.05)
    monitor = Hangs("nowhere", OSError())
    Guarded(monitor, said.append).finish("paused")
    monitor.forever.set()
    assert said == ["monitor.fragile: has not finished within 0.05 s: left behind"]


def test_numbers_of_a_row() -> None:
    found = dict(numbers(row(3)))
    assert found["loss"] == 2.5 and found["layer_gradients/a.b"] == 0.5 and found["tokens"] == 2048
    assert not {"step", "timestamp", "phase", "was_predicted", "val_loss"} & set(found)


def _scalars(folder: Path) -> list[tuple[int, float]]:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars("loss")]


def test_tensorboard_shows_a_resumed_run_as_one_line(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    for steps, loss in ((range(1, 9), 1.0), (range(5, 11), 2.0)):
        board = TensorBoard(tmp_path / "tensorboard")
        board.start({"steps": 10})
        for step in steps:
            board.log(row(step, loss))
        board.finish("failed")
    assert _scalars(tmp_path / "tensorboard") == [(s, 1.0) for s in range(1, 5)] + [(s, 2.0) for s in range(5, 11)]


def test_tensorboard_needs_a_folder_it_can_write(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"monitor\.tensorboard cannot write here"):
        Guarded(TensorBoard(tmp_path / "file" / "x")).start({})


def test_extras_that_are_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(MissingExtra, match=r"monitor\.wandb needs .*scale-trainer\[wandb\]"):
        Wandb(WandbConfig(project="p"), "demo", tmp_path)
    with pytest.raises(MissingExtra, match=r"scale-trainer\[tensorboard\]"):
        TensorBoard(tmp_path)


FAKE = """
import json, pathlib
calls = []
class Run:
    summary = {}
    def log(self, row, step): calls.append(["log", step, row])
    def finish(self, exit_code): calls.append(["finish", exit_code, dict(self.summary)])
def init(**arguments):
    calls.append(["init", arguments])
    return Run()
"""


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stands in for the service's client: records what it is called with."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "wandb.py").write_text(FAKE)
    monkeypatch.syspath_prepend(tmp_path / "lib")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def test_wandb_is_offline_unless_told_and_gets_the_numbers(tmp_path: Path, fake_wandb: Any) -> None:
    tracker = Wandb(WandbConfig(project="p"), "demo", tmp_path / "wandb")
    tracker.start({"steps": 3, "run_id": "a1", "step": 1})
    tracker.log(row(2))
    tracker.finish("failed")
    init, log, finish = fake_wandb.calls
    expected = {
        "project": "p",
        "name": "demo",
        "id": "a1",
        "resume": "allow",
        "allow_val_change": True,
        "mode": "offline",
        "dir": str(tmp_path / "wandb"),
        "config": {"steps": 3},
    }
    assert init == ["init", expected]
    assert log[1] == 2 and log[2]["loss"] == 2.5 and "val_loss" not in log[2]
    json.dumps(log[2], allow_nan=False)
    assert finish == ["finish", 1, {"status": "failed"}]


@pytest.mark.parametrize(("status", "code"), [("completed", 0), ("paused", 0), ("failed", 1), ("cancelled", 1)])
def test_a_paused_run_is_not_a_failed_one(tmp_path: Path, fake_wandb: Any, status: str, code: int) -> None:
    tracker = Wandb(WandbConfig(project="p"), "demo", tmp_path / "wandb")
    tracker.start({"run_id": "a1"})
    tracker.finish(status)
    assert fake_wandb.calls[-1] == ["finish", code, {"status": status}]


def test_every_start_of_a_run_is_the_same_one_to_a_tracker(tmp_path: Path) -> None:
    ids = []
    for steps in (1, 2):
        recorder = RunRecorder(RunFolder(tmp_path), [], {})
        recorder.open(None)
        recorder.monitors = [Guarded(Breaks("never", OSError()))]
        recorder.monitors[0].monitor.start = lambda facts: ids.append(facts["run_id"])  # type: ignore[method-assign]
        recorder.start(steps, steps - 1)
        recorder.close("stopped", None)
    assert len(ids) == 2 and len(set(ids)) == 1


def test_wandb_online_needs_its_key_in_the_environment(
    tmp_path: Path, fake_wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = WandbConfig(project="p", mode="online")
    with pytest.raises(UsageError, match="WANDB_API_KEY"):
        Wandb(config, "demo", tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "k")
    Wandb(config, "demo", tmp_path).start({"run_id": "a1"})
    assert "k" not in json.dumps(fake_wandb.calls[0][1]["config"])
