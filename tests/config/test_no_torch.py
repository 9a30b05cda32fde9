"""Configs load in milliseconds anywhere: reading one must not import the heavy libraries."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
import scale.config
scale.config.load_config("configs/demo.yaml")
print(*sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "transformers", "numpy", "datasets"}))
"""


def test_config_needs_no_torch() -> None:
    ran = subprocess.run([sys.executable, "-c", PROGRAM], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (ran.returncode, ran.stdout.strip()) == (0, ""), ran.stderr
