"""Starts `scale` processes from one that has imported everything already, so that a test can afford many of them.

`python -m tests.resume.warm` reads {"words": [...], "output": path} as lines of JSON, forks a process that is `scale WORDS` in
a session of its own, prints its id and, when it has ended, its exit code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


class Warm:
    """The process that forks others, one at a time."""

    def __init__(self) -> None:
        command = [sys.executable, "-m", "tests.resume.warm"]
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._say_and_hear("ready?")

    def start(self, words: list[str], output: Path) -> int:
        """The process id of `scale WORDS`."""
        return int(self._say_and_hear(json.dumps({"words": words, "output": str(output)})))

    def wait(self) -> int:
        """The exit code of the process started last; negative for a signal."""
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _say_and_hear(self, line: str) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self.process.stdout.readline()


def _next_process() -> list[str]:
    """In the parent, serve one order after the other; in each child, return the words of its command line."""
    for line in sys.stdin:
        if line == "ready?\n":
            print("yes", flush=True)
            continue
        order = json.loads(line)
        ready, is_ready = os.pipe()
        child = os.fork()
        if child == 0:
            os.setsid()
            output = os.open(order["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            nothing = os.open(os.devnull, os.O_RDONLY)
            for number, standard in ((nothing, 0), (output, 1), (output, 2)):
                os.dup2(number, standard)
            os.write(is_ready, b".")
            return list(order["words"])
        os.read(ready, 1)
        os.close(ready)
        os.close(is_ready)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    os._exit(0)


if __name__ == "__main__":
    import transformers.models.llama.modeling_llama  # noqa: F401

    import scale.build
    import scale.cli.main

    sys.argv[1:] = _next_process()
    sys.exit(scale.cli.main.main())
