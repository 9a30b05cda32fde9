"""The supervisor with fake ranks: fake_launch.py RUN MODE[,MORE] [options of launch/torchrun.sh]."""

from __future__ import annotations

import sys
from pathlib import Path

from scale.cluster import supervise

if __name__ == "__main__":
    run, mode, *options = sys.argv[1:]
    supervise._work = lambda args, launch: (["-m", "tests.cluster.fake_rank", *mode.split(",")], Path(run))
    sys.exit(supervise.main([*options, "config.yaml"]))
