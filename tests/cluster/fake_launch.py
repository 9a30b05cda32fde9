"""The supervisor with fake ranks: fake_launch.py RUN MODE[,MORE] [options of launch/torchrun.sh]."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from scale.cluster.options import read_launch
from scale.cluster.supervise import Nodes, supervise

if __name__ == "__main__":
    run, mode, *options = sys.argv[1:]
    launch, _ = read_launch([*options, "config.yaml"], os.environ)
    sys.exit(supervise(Nodes(launch, ["-m", "tests.cluster.fake_rank", *mode.split(",")], Path(run))))
