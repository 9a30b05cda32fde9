"""Rows against hand-computed values; strict JSON; cutting back; the same rows after a resume."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale.errors import ScaleError
from scale.monitor.kept import BrokenRows
from scale.monitor.records import FIELDS, TIME_FIELDS, WINDOW, Metrics, entropy, finite, read_rows
from scale.protocols import Score, StepKind, StepReport

NAN, INF = float("nan"), float("inf")


def report(step: int, loss: float = 2.0, kind: StepKind = "full", **more: Any) -> StepReport:
    plain: dict[str, Any] = {"grad_norm": 1.5, "lr": 3e-4, "tokens": 1000, "seconds": 0.5}
    passes = {"forward_passes": 4, "backward_passes": 3, "forward_tokens": 1000, "backward_tokens": 750}
    return StepReport(step=step, kind=kind, loss=loss, **{**plain, **passes, **more})


def strict(text: str) -> Any:
    """As other languages parse it: NaN and Infinity are errors."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


def test_one_row_by_hand(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.row(report(1, loss=3.0, sources={"web": 60, "code": 40}), None, {})
    row = metrics.row(
        report(2, loss=2.0, sources={"web": 150, "code": 50}, seq_len=64, metrics={"z_loss": 0.5}),
        Score(2.25, 10, {"web": 2.5, "code": 2.0}),
        {"mfu": 0.4, "memory_bytes": 7, "note": "hi"},
    )
    expected = {
        "step": 2,
        "loss": 2.0,
        "gradient_norm": 1.5,
        "phase": "full",
        "was_predicted": False,
        "confidence": None,
        "step_time_ms": 500.0,
        "tokens": 2000,
        "tokens_per_second": 2000.0,
        "mfu": 0.4,
        "memory_bytes": 7,
        "learning_rate": 3e-4,
        "perplexity": math.exp(2.0),
        "val_loss": 2.25,
        "val_by_source": {"web": 2.5, "code": 2.0},
        "train_val_gap": 0.25,
        "loss_velocity": -1.0,
        "loss_acceleration": None,
        "gradient_entropy": None,
        "layer_gradients": None,
        "sources": {"web": 0.75, "code": 0.25},
        "seq_len": 64,
        "skipped": None,
        "forward_passes": 8,
        "backward_passes": 6,
        "forward_tokens": 2000,
        "backward_tokens": 1500,
        "metrics": {"z_loss": 0.5},
        "note": "hi",
    }
    assert {name: row[name] for name in expected} == expected
    assert set(row) == {*FIELDS, "note"} and row["timestamp"] > 1.7e9


def test_every_row_has_every_field(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    rows = [metrics.score_row(0, Score(9.0, 5), {}), metrics.row(report(1, layer_gradients={"a": 1.0}), None, {})]
    assert [set(row) for row in rows] == [set(FIELDS)] * 2 and set(FIELDS) >= TIME_FIELDS
    assert rows[0]["val_loss"] == 9.0 and rows[0]["loss"] is None and rows[0]["tokens"] == 0


def test_velocity_is_the_least_squares_slope_of_the_last_thirty(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    steps, losses = np.arange(1, 101), rng.normal(3, 1, 100)
    metrics = Metrics(tmp_path / "m")
    rows = [metrics.row(report(int(s), loss=float(x)), None, {}) for s, x in zip(steps, losses, strict=True)]
    slopes = [None] + [np.polyfit(steps[:n][-WINDOW:], losses[:n][-WINDOW:], 1)[0] for n in range(2, 101)]
    assert rows[0]["loss_velocity"] is None
    assert [row["loss_velocity"] for row in rows[1:]] == pytest.approx(slopes[1:], rel=1e-9, abs=1e-12)
    assert [row["loss_acceleration"] for row in rows[:2]] == [None, None]
    accelerations = [b - a for a, b in itertools.pairwise(slopes[1:])]
    assert [row["loss_acceleration"] for row in rows[2:]] == pytest.approx(accelerations, rel=1e-6, abs=1e-9)


def test_skipped_and_unknown_losses_stay_out_of_the_velocity(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    metrics.row(report(1, loss=5.0), None, {})
    metrics.row(report(2, loss=900.0, kind="skipped", skipped="loss spike"), None, {})
    predicted = metrics.row(report(3, loss=NAN, kind="predict", tokens=0), None, {})
    row = metrics.row(report(4, loss=2.0), None, {})
    assert row["loss_velocity"] == pytest.approx(-1.0)  # from 5 at step 1 to 2 at step 4
    assert predicted["was_predicted"] and predicted["phase"] == "predict" and row["tokens"] == 3000


@pytest.mark.parametrize(
    ("norms", "expected"),
    [([1, 1, 1, 1], math.log(4)), ([0, 5], 0.0), ([3, 1], 0.75 * math.log(4 / 3) + 0.25 * math.log(4)), ([0], None)],
)
def test_entropy_by_hand(norms: list[float], expected: float | None) -> None:
    assert entropy(norms) == (None if expected is None else pytest.approx(expected))


def test_layer_gradients_by_hand(tmp_path: Path) -> None:
    norms = {"a": 1.0, "b": 2.0, "c": 3.0, "d": 0.019, "e": 201.0, "f": 0.0, "g": 2.0}  # median 2
    row = Metrics(tmp_path / "m").row(report(1, layer_gradients=norms), None, {})
    assert row["layer_gradients"] == norms
    names = ("max", "min", "vanishing", "exploding")
    assert [row[f"layer_gradient_{name}"] for name in names] == [201.0, 0.0, 2, 1]
    assert row["layer_gradient_mean"] == pytest.approx(209.019 / 7)
    broken = Metrics(tmp_path / "m").row(report(1, layer_gradients={"a": 1.0, "b": NAN}), None, {})
    assert (broken["layer_gradient_exploding"], broken["gradient_entropy"], broken["layer_gradient_max"]) == (
        1,
        None,
        1.0,
    )


def test_nan_and_infinity_are_null_at_any_depth(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    bad = report(1, loss=NAN, grad_norm=INF, layer_gradients={"a": NAN, "b": -INF}, metrics={"z": INF}, seconds=0.0)
    metrics.append(metrics.row(bad, Score(INF, 1, {"web": NAN}), {"mfu": NAN, "deep": [[INF], {"x": (NAN,)}]}))
    metrics.append(metrics.row(report(2, loss=1000.0), None, {}))  # exp overflows
    first, second = [strict(line) for line in metrics.path.read_text().splitlines()]
    for name in ("loss", "gradient_norm", "val_loss", "train_val_gap", "mfu", "perplexity", "tokens_per_second"):
        assert first[name] is None
    assert first["layer_gradients"] == {"a": None, "b": None} and first["deep"] == [[None], {"x": [None]}]
    assert second["loss"] == 1000.0 and second["perplexity"] is None


@given(st.recursive(st.floats() | st.text() | st.integers() | st.none() | st.booleans(), st.lists, max_leaves=20))
def test_any_value_becomes_strict_json(value: Any) -> None:
    strict(json.dumps(finite(value), allow_nan=False))


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_exactly(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    metrics = Metrics(tmp_path_factory.getbasetemp() / "floats.jsonl")
    metrics.append({"step": 1, "x": value})
    back = read_rows(metrics.path)[-1]["x"]
    assert back == value and math.copysign(1, back) == math.copysign(1, value)


def _run(metrics: Metrics, first: int, last: int) -> None:
    for step in range(first, last + 1):
        norms = {"a": 1.0 + step, "b": 2.0} if step % 5 == 0 else {}
        score = Score(3.0 / step, 7) if step % 10 == 0 else None
        loss = math.sin(step) + 10 / step
        metrics.append(metrics.row(report(step, loss, layer_gradients=norms, seconds=step + 1.0), score, {}))


def _timeless(path: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in TIME_FIELDS} for row in read_rows(path)]


@pytest.mark.parametrize("torn", ["", '{"step": 64, "lo', '{"step": 64, "loss": 1.0}', "\0\0\0\0"])
def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path, torn: str) -> None:
    whole = Metrics(tmp_path / "whole.jsonl")
    _run(whole, 1, 90)
    broken = Metrics(tmp_path / "broken.jsonl")
    _run(broken, 1, 50)
    state = json.loads(json.dumps(broken.state_dict(), allow_nan=False))
    _run(broken, 51, 63)
    with broken.path.open("a") as handle:
        handle.write(torn)
    before = broken.path.read_bytes().split(b"\n")
    resumed = Metrics(broken.path)
    resumed.load_state_dict(state)
    resumed.cut(50)
    assert broken.path.read_bytes() == b"\n".join(before[:50]) + b"\n"
    _run(resumed, 51, 90)
    assert _timeless(resumed.path) == _timeless(whole.path)
    assert resumed.state_dict() == whole.state_dict()


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    metrics.path.write_text('{"step": 1}\n{"step": 2}')
    assert [row["step"] for row in read_rows(metrics.path)] == [1, 2]
    metrics.cut(2)
    metrics.append({"step": 3})
    assert metrics.path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'


def test_cut_without_a_file_and_to_nothing(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    metrics.cut(5)
    assert not metrics.path.exists()
    metrics.append({"step": 0})
    metrics.cut(-1)
    assert metrics.path.read_text() == ""


@pytest.mark.parametrize("line", ["garbage", '{"loss": 1}', '{"step": "1"}', "[1]"])
def test_a_broken_line_in_the_middle_is_named_and_nothing_is_lost(tmp_path: Path, line: str) -> None:
    metrics = Metrics(tmp_path / "m")
    text = f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'
    metrics.path.write_text(text)
    with pytest.raises(ScaleError, match="line 2 is no metrics row"):
        metrics.cut(1)
    assert metrics.path.read_text() == text


def test_what_a_checkpoint_counted_is_checked_line_by_line(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    _run(metrics, 1, 4)
    kept, text = metrics.kept.to_json(), metrics.path.read_bytes()
    _run(metrics, 5, 6)
    metrics.path.write_bytes(metrics.path.read_bytes() + b"\0garbage\n\n{")  # after the checkpoint: done again anyway
    again = Metrics(metrics.path)
    again.cut(4, kept)
    assert metrics.path.read_bytes() == text and again.kept.to_json() == kept
    lines = text.splitlines(keepends=True)
    for broken in (lines[1:], lines[:3], [lines[0], *lines[2:]], [*lines, lines[3]], [*lines[:3], b"x\n"]):
        content = b"".join(broken)
        if broken[:4] == lines:
            continue
        metrics.path.write_bytes(content)
        with pytest.raises(BrokenRows, match=r"rows up to step 4|line 4 is no metrics row"):
            Metrics(metrics.path).cut(4, kept)
        assert metrics.path.read_bytes() == content
    metrics.path.write_bytes(b"".join(lines).replace(b'"step": ', b'"step": 10'))
    again.cut(4, kept)  # no row up to the step is left: nothing to keep
    assert metrics.path.read_bytes() == b"" and again.kept.rows == 0


def test_each_row_is_readable_at_once(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "m")
    for step in range(3):
        metrics.append({"step": step})
        assert len(read_rows(metrics.path)) == step + 1


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ScaleError, match="cannot be written: No such file"):
        Metrics(tmp_path / "none" / "m").append({"step": 1})
