#!/usr/bin/env python3
"""Train on a Ray cluster. See launch/ray_train.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale.cluster.ray_ranks import main

sys.exit(main())
