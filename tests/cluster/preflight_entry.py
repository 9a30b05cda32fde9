"""A rank of the preflight with a defect: preflight_entry.py DEFECT [options of launch/preflight.py]."""

from __future__ import annotations

import importlib.metadata
import os
import signal
import sys
import threading
import time
from pathlib import Path

from scale.cluster import node_report, preflight, preflight_ranks


def spoil(defect: str) -> None:
    """Make this rank (1) differ from rank 0 as named."""
    real_version, real_time = importlib.metadata.version, time.time
    if defect == "version":
        node_report.importlib.metadata.version = lambda name: "4.0" if name == "transformers" else real_version(name)
    elif defect == "clock":
        preflight_ranks.time.time = lambda: real_time() + 60
    elif defect == "unshared":
        sys.argv[sys.argv.index("--folder") + 1] += "-elsewhere"
    elif defect == "unwritable":
        blocked = Path(sys.argv[sys.argv.index("--folder") + 1]) / "file"
        blocked.write_text("not a folder")
        sys.argv[sys.argv.index("--folder") + 1] = str(blocked)
    elif defect == "never":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif defect == "hangs":
        real_stages = preflight_ranks._stages

        def stages(*setup: object) -> object:
            threading.Timer(1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
            time.sleep(2)
            return real_stages(*setup)  # type: ignore[arg-type]

        preflight_ranks._stages = stages  # type: ignore[assignment]


if __name__ == "__main__":
    defect = sys.argv.pop(1)
    if os.environ.get("RANK") == "1":
        spoil(defect)
    sys.exit(preflight.main())
