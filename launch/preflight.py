#!/usr/bin/env python3
"""May these machines train together? See launch/preflight.py --help."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scale.cluster.preflight import main

sys.exit(main())
