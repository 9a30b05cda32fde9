"""SIGKILL before every single file operation of a save, a replacement and a rotation, and at random times."""

import subprocess
import sys
from pathlib import Path


def test_no_kill_leaves_a_broken_checkpoint(tmp_path: Path) -> None:
    script = Path(__file__).with_name("killed.py")
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) > 50
