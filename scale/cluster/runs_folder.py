"""The folder in which a config puts its runs, for job scripts: `python -m scale.cluster.runs_folder CONFIG key=value ...`."""

from __future__ import annotations

import sys
from pathlib import Path

from scale.config import load_config
from scale.errors import EXIT_OK, EXIT_USAGE, ScaleError


def main(arguments: list[str]) -> int:
    """Prints the absolute path. Options of the launcher among the overrides are left to it. Returns the exit code."""
    if not arguments:
        print("scale: error: expected CONFIG [key=value ...]", file=sys.stderr)
        return EXIT_USAGE
    try:
        config = load_config(
            Path(arguments[0]), [word for word in arguments[1:] if "=" in word and not word.startswith("-")]
        )
    except ScaleError as error:
        print(f"scale: error: {error}", file=sys.stderr)
        return error.exit_code
    print(Path(config.runs_dir).absolute())
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
