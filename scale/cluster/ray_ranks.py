"""`launch/ray_train.py`: the ranks of `scale train` on a Ray cluster, one plain actor each."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from scale.cluster.attempts import Attempt, Ended, Outcome, Stop, judge, run_attempts, say
from scale.cluster.options import Parser
from scale.cluster.work import train_command
from scale.config import load_config
from scale.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED, MissingExtra, ScaleError, UsageError
from scale.streams import guarded_output
from scale.train.stop import StopSignal

GRACE_SECONDS = 5.0
"""How long after the first failure other ranks may say that they failed before, or why."""
EPILOG = """\
examples:
  ray job submit --working-dir . -- python launch/ray_train.py configs/demo.yaml
  ray job submit --working-dir . -- python launch/ray_train.py configs/demo.yaml --ranks 16 train.steps=50
  python launch/ray_train.py configs/demo.yaml --ranks 2 --gpus-per-rank 0      on a machine of the cluster

The folders of the config must be on a file system that all machines share.
exit codes: 0 done, 1 failed, 2 wrong config or argument, 75 stopped on request (run the same command again)
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point. Returns the exit code."""
    with guarded_output(goes_on=True), StopSignal(phase="before") as early:
        try:
            cluster = _connected(arguments)
            # signal handlers only leave a note: `run` looks at it between two calls of Ray
            with Stop(ask=lambda: None, kill=lambda: None) as stop:
                early.phase, cluster.stop = "after", stop
                return run_attempts(cluster.run, stop, retries=cluster.args.retries)
        except ScaleError as error:
            print(f"scale: error: {error}", file=sys.stderr)
            return error.exit_code
        except OSError as error:
            print(f"scale: error: {error.filename or 'the launcher'}: {error.strerror or error}", file=sys.stderr)
            return EXIT_FAILED
        except KeyboardInterrupt:
            print("scale: interrupted", file=sys.stderr)
            return early.exit_code or EXIT_INTERRUPTED


def _connected(arguments: Sequence[str] | None) -> _Cluster:
    args = _parse(arguments)
    command, run = train_command(args.config, args.overrides, args.allow_change, args.new)
    device = load_config(args.config, list(args.overrides)).compute.device
    if args.gpus_per_rank == 1 and device == "cpu":
        raise UsageError("--gpus-per-rank 1: but compute.device = 'cpu', which uses none (--gpus-per-rank 0)")
    if args.gpus_per_rank == 0 and device == "cuda":
        raise UsageError("--gpus-per-rank 0: but compute.device = 'cuda' (--gpus-per-rank 1)")
    if device == "cpu":
        args.gpus_per_rank = 0
    _connect(args.address)
    return _Cluster(args, command, run)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="launch/ray_train.py",
        description="Train on a Ray cluster.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    parser.add_argument(
        "--ranks", type=int, metavar="N", help="processes (default: one per GPU of the cluster, else 1)"
    )
    parser.add_argument("--gpus-per-rank", type=int, choices=(0, 1), help="default: 1 if the cluster has GPUs")
    parser.add_argument("--cpus-per-rank", type=int, default=1, metavar="N", help="CPUs, and threads (%(default)s)")
    parser.add_argument(
        "--retries", type=int, default=2, metavar="N", help="new starts after a lost machine (%(default)s)"
    )
    parser.add_argument(
        "--wait", type=int, default=120, metavar="S", help="wait so long for free machines (%(default)s s)"
    )
    parser.add_argument(
        "--address", default="auto", help="of the cluster (default: the one of the job or this machine)"
    )
    parser.add_argument("--new", action="store_true", help="start a new run named NAME_YYYYmmdd_HHMMSS")
    parser.add_argument("--allow-change", default="", metavar="KEYS", help="as for `scale train`")
    args, rest = parser.parse_known_args(arguments)
    args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in args.overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    for name, least in (("ranks", 1), ("cpus_per_rank", 1), ("retries", 0), ("wait", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UsageError(f"--{name.replace('_', '-')} {value}: expected {least} or more")
    return args


def _connect(address: str) -> None:
    try:
        import ray
    except ImportError:
        raise MissingExtra("launch/ray_train.py", "ray") from None
    try:
        ray.init(address=address, namespace="scale", log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"no Ray cluster at {address!r} (start one with `ray start --head`): {reason}") from None


class _Cluster:
    """The actors of one attempt after the other."""

    stop: Stop

    def __init__(self, args: argparse.Namespace, command: list[str], run: Path):
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0))
        self.args, self.command, self.path = args, command, run
        self.ranks: int = args.ranks or max(1, gpus)
        self.gpus: int = args.gpus_per_rank if args.gpus_per_rank is not None else int(gpus > 0)
        self.started = f"{datetime.now():%Y%m%d_%H%M%S}"

    def run(self, attempt: Attempt) -> Outcome:
        """One attempt, from start to end."""
        from ray.exceptions import RayError
        from ray.util import placement_group, remove_placement_group

        bundle = {"CPU": float(self.args.cpus_per_rank)} | ({"GPU": float(self.gpus)} if self.gpus else {})
        group = placement_group([bundle] * self.ranks, strategy="PACK", lifetime="detached")
        actors: list[Any] = []
        try:
            if not self._placed(group):
                if self.stop.asked:
                    return Outcome(EXIT_STOPPED)
                what = ", ".join(f"{self.ranks * count:g} {name}" for name, count in bundle.items())
                return Outcome(EXIT_FAILED, f"Ray has not {what} free for {self.ranks} ranks within {self.args.wait} s")
            actors = [self._actor(group, attempt, index) for index in range(self.ranks)]
            return self._follow(actors, attempt)
        except RayError as error:
            return Outcome(EXIT_FAILED, f"Ray: {_short(error)}", lost=True)
        finally:
            self._end(actors)
            with suppress(RayError):
                remove_placement_group(group)

    def _placed(self, group: Any) -> bool:
        deadline = time.monotonic() + self.args.wait
        while time.monotonic() < deadline and not self.stop.asked:
            if group.wait(timeout_seconds=1):
                return True
        return False

    def _actor(self, group: Any, attempt: Attempt, index: int) -> Any:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        from scale.cluster.ray_actor import RankActor

        place = PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index)
        return (
            ray.remote(RankActor)
            .options(
                name=f"scale-{self.started}-{os.getpid()}-{attempt.number}-{index}",
                lifetime="detached",  # lives on for a checkpoint when the driver is killed
                max_concurrency=2,
                num_cpus=self.args.cpus_per_rank,
                num_gpus=self.gpus,
                scheduling_strategy=place,
            )
            .remote()
        )

    def _follow(self, actors: list[Any], attempt: Attempt) -> Outcome:
        """Start the ranks, pass on what rank 0 prints, and judge."""
        import ray

        from scale.cluster.ray_actor import Task

        # by these addresses the machines of the cluster reach each other
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        places = [place | {"ip": addresses[place["node"]]} for place in ray.get([a.where.remote() for a in actors])]
        # ranks of a machine are neighbours
        order = sorted(
            range(self.ranks), key=lambda index: (places[index]["node"] != places[0]["node"], places[index]["node"])
        )
        actors[:] = [actors[index] for index in order]
        places = [places[index] for index in order]
        split = ["--split", str(attempt.split)] if attempt.split > 1 else []
        command = ["-u", *self.command, *split]
        logs = self.path.absolute() / "logs" / f"{self.started}.{attempt.number}"
        nodes = Counter(place["node"] for place in places)
        pending = {}
        for rank, (actor, environment) in enumerate(zip(actors, _environments(places), strict=True)):
            here = nodes[places[rank]["node"]]
            task = Task(rank, command, environment, places[rank]["ip"], here, logs, self.path.absolute())
            pending[actor.run.remote(task)] = rank
        say(f"{self.ranks} ranks on {len(nodes)} machines; what ranks other than 0 print: {logs} in the end")
        return self._wait(actors, pending, str(logs))

    def _wait(self, actors: list[Any], pending: dict[Any, int], logs: str) -> Outcome:
        import ray
        from ray.exceptions import RayError

        ended: list[Ended] = []
        words: list[Outcome] = []
        dead: list[Outcome] = []
        killer: str | None = None
        offset, until = 0, float("inf")
        while pending and time.monotonic() < until and not self.stop.killed:
            done, _ = ray.wait(list(pending), timeout=0.5)
            for reference in done:
                rank = pending.pop(reference)
                try:
                    result = ray.get(reference)
                except RayError as error:
                    dead.append(
                        Outcome(EXIT_FAILED, f"rank {rank}: its Ray actor or machine died: {_short(error)}", lost=True)
                    )
                else:
                    words += [Outcome(*result.outcome)] if result.outcome is not None else []
                    ended += [Ended(rank, result.exit_code)] if result.exit_code else []
                    killer = killer or result.out_of_memory
            if dead or ended:
                until = min(until, time.monotonic() + GRACE_SECONDS)
            offset = self._poll(actors, offset)
        self._poll(actors, offset)
        words = sorted(words, key=lambda word: word.lost)
        if dead and (not words or words[0].lost):
            return dead[0]
        return judge(words[0] if words else None, ended, logs, self.stop.asked, killer)

    def _poll(self, actors: list[Any], offset: int) -> int:
        """Show that the driver lives, pass on a request to stop, print what is new from rank 0. Returns the new offset."""
        import ray
        from ray.exceptions import RayError

        texts = [actor.poll.remote(offset if rank == 0 else None, self.stop.asked) for rank, actor in enumerate(actors)]
        with suppress(RayError):  # a dead actor shows in its `run`
            text = ray.get(texts[0], timeout=30)
            sys.stdout.write(text.decode(errors="replace"))
            sys.stdout.flush()
            return offset + len(text)
        return offset

    def _end(self, actors: list[Any]) -> None:
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):
            ray.wait([actor.clean.remote() for actor in actors], num_returns=len(actors), timeout=2) if actors else None
        for actor in actors:
            with suppress(RayError):
                ray.kill(actor)


def _environments(places: list[dict[str, Any]]) -> list[dict[str, str]]:
    """What torchrun would give each rank. All ranks of a machine see all its GPUs, as NCCL wants."""
    local: Counter[str] = Counter()
    out = []
    for rank, place in enumerate(places):
        neighbours = [other for other in places if other["node"] == place["node"]]
        environment = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(places)),
            "LOCAL_RANK": str(local[place["node"]]),
            "LOCAL_WORLD_SIZE": str(len(neighbours)),
            "MASTER_ADDR": places[0]["ip"],
            "MASTER_PORT": str(places[0]["port"]),
        }
        # none where none was asked for: a rank would take those that Ray gave to others
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpu for other in neighbours for gpu in other["gpus"])
        local[place["node"]] += 1
        out.append(environment)
    return out


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


if __name__ == "__main__":
    sys.exit(main())
