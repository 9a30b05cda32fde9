"""Saving, rotating, failing and being killed."""

import errno
import json
import math
import os
import random
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from scale.checkpoint.manifest import DamagedCheckpoint
from scale.checkpoint.saved import saved_in
from scale.checkpoint.store import Checkpoints
from scale.errors import ScaleError


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "model/layer.0.weight": torch.randn(5, 7, generator=g),
        "model/empty": torch.zeros(0, 3),
        "model/half": torch.randn(9, generator=g).to(torch.bfloat16),
        "optim/layer.0.weight/exp_avg": torch.randn(7, 5, generator=g).t(),
        "optim/layer.0.weight/step": torch.tensor(float(seed)),
        "count": torch.tensor(2**62 + seed),
        "mask": torch.tensor([True, False]),
    }


def test_a_state_with_numbers_that_json_does_not_know_is_strict_json_and_comes_back(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 3, 0)
    store.save(1, {}, {"best": math.inf, "loss": [math.nan, -math.inf, 1.5]}, None)
    store.wait()
    text = (tmp_path / "step_00000001" / "state.json").read_text()
    json.loads(text, parse_constant=pytest.fail)
    found = store.saved()[0].state()
    assert found["best"] == math.inf and math.isnan(found["loss"][0]) and found["loss"][1:] == [-math.inf, 1.5]


def save(store: Checkpoints, step: int, val_loss: float | None = None) -> None:
    store.save(step, tensors(step), {"step": step}, val_loss)
    store.wait()


def steps(store: Checkpoints) -> list[int]:
    return [saved.step for saved in store.saved()]


def flip(path: Path, offset: int = 10) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def test_round_trip_is_exact_for_every_dtype(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints", 3, 2)
    state = {"loader": {"epoch": 2, "at": [3, 1.1]}, "loss": 0.1 + 0.2, "text": "ção", "none": None, "ok": True}
    store.save(100, tensors(1), state, 2.5)
    store.wait()
    saved = store.latest_good()
    assert saved is not None and (saved.step, saved.val_loss, saved.path.name) == (100, 2.5, "step_00000100")
    assert saved.state() == state
    assert saved.shapes() == {name: value.shape for name, value in tensors(1).items()}
    blank = {name: torch.full_like(value, 1) for name, value in tensors(1).items()}
    kept = dict(blank)
    saved.read(blank)
    for name, value in tensors(1).items():
        assert blank[name] is kept[name] and torch.equal(blank[name], value) and blank[name].dtype == value.dtype
    part = {"model/half": torch.zeros(9, dtype=torch.bfloat16)}
    saved.read(part)
    assert torch.equal(part["model/half"], tensors(1)["model/half"])


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ({"model/other": torch.zeros(1)}, "holds no tensor 'model/other'"),
        ({"model/half": torch.zeros(8, dtype=torch.bfloat16)}, "model/half: shape and dtype"),
        ({"model/half": torch.zeros(9)}, "model/half: shape and dtype"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, wanted: dict[str, torch.Tensor], why: str) -> None:
    store = Checkpoints(tmp_path, 1, 0)
    save(store, 1)
    with pytest.raises(ScaleError, match=why):
        store.saved()[0].read(wanted)


def test_a_save_is_a_snapshot_and_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing is held back until tensors and state were changed: what is written is what was given."""
    go, running, most = threading.Event(), [], []
    real = dcp.save

    def held(*args: object, **kwargs: object) -> object:
        running.append(1)
        most.append(len(running))
        go.wait(30)
        try:
            return real(*args, **kwargs)
        finally:
            running.pop()

    monkeypatch.setattr(dcp, "save", held)
    store = Checkpoints(tmp_path, 3, 0)
    live, state = tensors(1), {"list": [1]}
    store.save(1, live, state, None)
    for value in live.values():
        value.zero_()
    state["list"].append(2)
    store.poll()
    assert store.saved() == []
    second = threading.Thread(target=store.save, args=(2, tensors(2), {}, None))
    second.start()
    second.join(0.3)
    assert second.is_alive() and most == [1]  # the second waits for the first
    go.set()
    second.join(30)
    store.wait()
    assert most == [1, 1] and steps(store) == [1, 2]
    first = store.saved()[0]
    blank = {name: torch.zeros_like(value) for name, value in tensors(1).items()}
    first.read(blank)
    assert all(torch.equal(blank[name], value) for name, value in tensors(1).items())
    assert first.state() == {"list": [1]}


def test_saving_and_reading_leave_all_generators_alone(tmp_path: Path) -> None:
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    store = Checkpoints(tmp_path, 1, 1)
    save(store, 1, 0.5)
    save(store, 2, 0.4)
    saved = store.latest_good()
    assert saved is not None
    saved.read({"count": torch.tensor(0)})
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == random.getstate()
    assert (before[2] == np.random.get_state()[1]).all()


def test_damaged_newest_is_named_and_the_one_before_is_used(tmp_path: Path) -> None:
    said: list[str] = []
    store = Checkpoints(tmp_path, 3, 0, said.append)
    assert store.latest_good() is None
    for step in (1, 2, 3):
        save(store, step)
    flip(tmp_path / "step_00000003" / "__0_0.distcp")
    (tmp_path / "step_00000002" / "state.json").unlink()
    found = store.latest_good()
    assert found is not None and found.step == 1
    assert len(said) == 2 and "step_00000003/__0_0.distcp" in said[0] and "SHA-256" in said[0]
    assert "step_00000002/state.json: is missing" in said[1]
    flip(tmp_path / "step_00000001" / "manifest.json")
    with pytest.raises(ScaleError, match="none of the 3 checkpoints is whole"):
        store.latest_good()


def test_damaged_ones_do_not_crowd_out_good_ones(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 3, 1, lambda line: None)
    save(store, 1, 1.0)
    save(store, 2, 0.1)
    save(store, 3, 2.0)
    flip(tmp_path / "step_00000003" / "state.json", 0)
    flip(tmp_path / "step_00000002" / "state.json", 0)
    store = Checkpoints(tmp_path, 2, 1, lambda line: None)
    found = store.latest_good()
    assert found is not None and found.step == 1
    save(store, 2, 3.0)  # the same step again: replaces the damaged one
    assert steps(store) == [1, 2]
    for saved in store.saved():
        saved.verify()
    assert store.saved()[1].val_loss == 3.0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("last", "best", "losses", "kept"),
    [
        (3, 2, [5, 1, 4, 2, 3, 6, 7], [2, 4, 5, 6, 7]),
        (3, 2, [5, 4, 3, 2, 1], [3, 4, 5]),
        (1, 0, [1, 2, 3], [3]),
        (1, 1, [1, None, None], [1, 3]),
        (1, 2, [None, None, None, None], [4]),
        (2, 1, [float("nan"), 3, float("-inf"), 4, 5], [2, 4, 5]),
        (1, 1, [1, 1, 2], [2, 3]),  # a tie: the later one
    ],
)
def test_rotation_keeps_the_last_and_the_best(
    tmp_path: Path, last: int, best: int, losses: list[float | None], kept: list[int]
) -> None:
    store = Checkpoints(tmp_path, last, best)
    for step, loss in enumerate(losses, start=1):
        save(store, step, loss)
        assert steps(store)[-1] == step
    assert steps(store) == kept
    assert {p.name for p in tmp_path.iterdir()} == {f"step_{step:08d}" for step in kept}


def test_what_was_just_written_stays_even_beside_a_later_step(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 1, 0)
    save(store, 5)
    save(store, 2)
    assert steps(store) == [2, 5]


def test_every_byte_is_forced_to_disk_before_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        events.append(os.fstat(handle).st_ino)
        real_fsync(handle)

    def replace(source: Path, target: Path) -> None:
        events.append("rename")
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    store = Checkpoints(tmp_path, 1, 0)
    save(store, 1)
    at = events.index("rename")
    folder = store.saved()[0].path
    assert {p.stat().st_ino for p in (folder, *folder.iterdir())} <= set(events[:at])
    assert events[at + 1 :] == [tmp_path.stat().st_ino]


@pytest.mark.parametrize("where", ["dcp", "state", "manifest", "rename", "hash"])
def test_a_failure_in_the_background_is_one_line_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    store = Checkpoints(tmp_path, 2, 0)
    save(store, 1)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "dcp": (dcp.FileSystemWriter, "write_data"),
        "state": (Path, "write_text"),
        "manifest": (Path, "write_bytes"),
        "rename": (os, "replace"),
        "hash": (os, "fsync"),
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(*target, full)
        store.save(2, tensors(2), {}, None)
        with pytest.raises(ScaleError) as caught:
            store.wait()
    message = str(caught.value)
    assert "\n" not in message and "step 2" in message and "No space left on device" in message
    assert str(tmp_path) in message
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
    store.wait()
    save(store, 3)  # goes on once there is room
    assert steps(store) == [1, 3]


def test_poll_reports_without_waiting(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "gone", 1, 0)
    shutil.rmtree(tmp_path / "gone")
    store.save(1, tensors(), {}, None)
    assert store._thread is not None
    store._thread.join()
    with pytest.raises(ScaleError, match="No such file or directory"):
        store.poll()
    store.poll()


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        done = False
    if not done:
        pytest.skip("mounting a tmpfs needs rights")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_really_full_disk(small_disk: Path) -> None:
    store = Checkpoints(small_disk / "checkpoints", 2, 0)
    save(store, 1)
    for size in (2**18, 2**20):  # full within one file, and full at once
        store.save(2, {"big": torch.zeros(size)}, {"pad": "x" * 2**19}, None)
        with pytest.raises(ScaleError) as caught:
            store.wait()
        assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
        assert [p.name for p in store.folder.iterdir()] == ["step_00000001"]
    found = store.latest_good()
    assert found is not None and found.step == 1


def test_an_unusable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ScaleError, match="no checkpoints can be written here"):
        Checkpoints(tmp_path / "file" / "checkpoints", 1, 0)


def test_leftovers_of_a_killed_process_are_cleaned_up(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 3, 0)
    for step in (1, 2, 3):
        save(store, step)
    (tmp_path / ".tmp-step_00000004").mkdir()
    (tmp_path / ".tmp-step_00000004" / "state.json").write_text("{")
    (tmp_path / "step_00000003").rename(tmp_path / ".old-step_00000003")  # killed while it was being replaced
    shutil.copytree(tmp_path / "step_00000002", tmp_path / ".old-step_00000002")  # killed just after
    assert [saved.step for saved in saved_in(tmp_path)] == [1, 2]
    store = Checkpoints(tmp_path, 3, 0)
    assert {p.name for p in tmp_path.iterdir()} == {f"step_{step:08d}" for step in (1, 2, 3)}
    for saved in store.saved():
        saved.verify()


def test_looking_from_outside_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / ".tmp-step_00000001").mkdir()
    assert saved_in(tmp_path) == [] and saved_in(tmp_path / "none") == []
    assert (tmp_path / ".tmp-step_00000001").exists()


def test_verify_looks_again(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, 1, 0)
    save(store, 1)
    saved = store.saved()[0]
    saved.verify()
    flip(saved.path / "state.json", 0)
    with pytest.raises(DamagedCheckpoint):
        saved.verify()
    with pytest.raises(DamagedCheckpoint):
        saved.state()
