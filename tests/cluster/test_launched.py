"""What a rank tells the launcher that started it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scale.cli.launched import error_line, told_to_launcher
from scale.errors import ScaleError


def test_host_memory_that_runs_out_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SCALE_OUTCOME": str(tmp_path / "outcome"), "RANK": "1", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ScaleError) as caught, told_to_launcher():
        raise MemoryError
    note = json.loads((tmp_path / "outcome").read_text())
    assert note["text"] == error_line(caught.value)
    assert note["text"].startswith("rank 1: out of host memory") and note["exit_code"] == 1
