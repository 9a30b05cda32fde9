"""Stands for `scale train` in a rank: behaves as its first argument says. Imports nothing heavy."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from scale.lifeline import die_with_launcher

RANK = int(os.environ["RANK"])


def outcome(code: int, text: str = "", lost: bool = False) -> int:
    try:
        with Path(os.environ["SCALE_OUTCOME"]).open("x") as file:
            json.dump({"rank": RANK, "exit_code": code, "text": f"rank {RANK}: {text}", "lost": lost}, file)
    except FileExistsError:
        pass
    return code


def lose_peers() -> int:
    """Ranks lose another one only after it has said why; those of other nodes see no more of that than time passing."""
    limit = time.monotonic() + (60 if RANK == 0 else 0)
    while time.monotonic() < limit and not Path(os.environ["SCALE_OUTCOME"]).exists():
        time.sleep(0.02)
    time.sleep(0.5)
    return outcome(1, text="lost contact with another rank", lost=True)


def main() -> int:
    die_with_launcher()
    mode, *rest = sys.argv[1:]
    split = int(rest[rest.index("--split") + 1]) if "--split" in rest else 1
    print(f"rank {RANK} of {os.environ['WORLD_SIZE']} split {split} terminal {sys.stdout.isatty()}")
    print(f"warning of rank {RANK}", file=sys.stderr)
    if mode == "fail":
        return outcome(1, text="the data are bad") if RANK == 1 else lose_peers()
    if mode == "usage":
        print("an error", file=sys.stderr)
        return outcome(2, text="data.path = 'x': no such file")
    if mode == "memory" and split < int(rest[0]):
        return outcome(76, text=f"out of memory with split {split}") if RANK == 1 else lose_peers()
    if mode == "deaf" and split == 1:  # other ranks notice nothing and do not end when they are asked to
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if int(rest[0]) == RANK:
            return outcome(76, text="out of memory")
        time.sleep(1000)
    if mode == "killed":  # rank 0 speaks first, although it only lost the other one
        if RANK == 1:
            while not Path(os.environ["SCALE_OUTCOME"]).exists():
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)
        outcome(1, text="lost contact with another rank", lost=True)
        time.sleep(30)
    if mode == "silent":
        return 3 * RANK
    if mode in ("stop", "hang"):
        (Path(rest[0]) / f"{RANK}.pid").write_text(str(os.getpid()))
        stop = Path(os.environ["SCALE_STOP_FILE"])
        while mode == "hang" or not stop.exists():
            time.sleep(0.05)
        outcome(75)
    return 0


if __name__ == "__main__":
    sys.exit(main())
