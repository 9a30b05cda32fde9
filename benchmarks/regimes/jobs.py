"""Runs that are kept: a benchmark that takes days goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.regimes import controls
from benchmarks.regimes.start import Settings
from benchmarks.regimes.tasks import Outcome, Task, predictive, run
from scale.monitor.run_state import read_git

COMMIT = (read_git(Path(__file__).parent)["git_commit"] or "")[:12]
CONTROLS: dict[str, Callable[..., Any]] = {
    "tail mean": lambda full: controls.TailMean(full, 0.1),
    "outer Nesterov": lambda full: controls.OuterNesterov(full, 20, 0.5),
    "EMA-Nesterov": lambda full: controls.EmaNesterov(full, 15.0, 0.95),
}


@dataclass(frozen=True)
class Job:
    """One run, described by plain values. `kind`: full, predict, shuffled (its features), selection or a control's name."""

    task: str
    kind: str
    seed: int
    steps: int
    lr: float
    selection: str = "off"
    predict: Mapping[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)


class Kept:
    """Outcomes by job, one line each in a file that only grows."""

    def __init__(self, path: Path, say: Callable[[str], None]):
        self.path, self.say = path, say
        self.found: dict[str, Outcome] = {}
        self.commits: set[str] = set()
        """Of the code that made them: outcomes of older code are used as they are."""
        if path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self.found[record["key"]] = Outcome(**record["outcome"])
                self.commits.add(record.get("commit", "unknown"))

    def outcome(self, tasks: Mapping[str, Task], job: Job) -> Outcome:
        """Run the job, unless that was done before."""
        if job.key not in self.found:
            settings = Settings(job.seed, job.steps, job.lr, job.selection)
            around = predictive(job.predict, job.kind == "shuffled") if job.predict else CONTROLS.get(job.kind)
            found = run(tasks[job.task], settings, around)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": job.key, "commit": COMMIT, "outcome": asdict(found)}) + "\n")
            self.found[job.key] = found
            self.commits.add(COMMIT)
            self.say(f"{job.task}: {job.kind} seed {job.seed} steps {job.steps} lr {job.lr:g}: loss {found.loss:.5g}")
        return self.found[job.key]


def at(job: Job, **changes: Any) -> Job:
    return replace(job, **changes)
