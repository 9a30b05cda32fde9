"""The torchrun agent of one node as a child process: joins the others, starts this node's ranks, reports how they ended.

It is torch's elastic launcher called as a library, because the command line of torchrun turns what it knows (which rank
ended how) into text and every exit code into 1.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from scale.lifeline import PARENT, die_with


@dataclass(frozen=True)
class Order:
    """What the agent is to start. Everything travels as JSON on its command line."""

    parent: int
    nodes: int
    ranks: int
    """On this node."""
    identity: str
    """The same on all nodes, new for each attempt."""
    host: str
    port: int
    local_addr: str | None
    join_seconds: int
    command: list[str]
    """Of a rank, without the Python interpreter."""
    logs: str
    """Folder for what ranks other than 0 print."""
    started: str
    """File to make when all nodes have met and ranks start."""
    report: str
    """File to write how the ranks ended: {"ended": [[rank, exit code], ...]} or {"problem": text}."""

    def start(self) -> list[str]:
        """The command that runs this order."""
        return [sys.executable, "-m", "scale.cluster.agent", json.dumps(asdict(self))]


def main() -> int:
    """Run the order given as the only argument."""
    order = Order(**json.loads(sys.argv[1]))
    die_with(order.parent)
    os.environ[PARENT] = str(os.getpid())  # of the ranks
    # the supervisor decides; a scheduler that signals every process must not kill the ranks by way of the agent
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, lambda *_: None)
    logging.basicConfig(filename=Path(order.logs, "agent.log"), level=logging.WARNING)
    report = _run(order)
    Path(order.report).write_text(json.dumps(report), encoding="utf-8")
    return 0


def _run(order: Order) -> dict[str, Any]:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import rendezvous_handler_registry
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    _only_to_file()
    rendezvous_handler_registry.register("loopback", _loopback_rendezvous)
    config = LaunchConfig(
        min_nodes=order.nodes,
        max_nodes=order.nodes,
        nproc_per_node=order.ranks,
        run_id=order.identity,
        rdzv_endpoint=f"{order.host}:{order.port}",
        rdzv_backend="loopback" if order.host == "127.0.0.1" else "c10d",
        rdzv_configs={"join_timeout": order.join_seconds, "read_timeout": order.join_seconds},
        max_restarts=0,
        local_addr=order.local_addr,
        logs_specs=_logs_specs(Path(order.logs), Path(order.started)),
        signals_to_handle="SIGQUIT",
    )
    try:
        elastic_launch(config, sys.executable)("-u", *order.command)
    except ChildFailedError as error:
        first = min(failure.timestamp for failure in error.failures.values())
        # those that ended later were killed by the agent
        early = [(rank, f.exitcode) for rank, f in error.failures.items() if f.timestamp - first <= 2]
        return {"ended": early}
    except Exception as error:  # whatever torch raises: the report is the only way to the supervisor
        logging.exception("torchrun")
        return {"problem": " ".join(str(error).split())[:200] or type(error).__name__}
    return {"ended": []}


def _only_to_file() -> None:
    """The terminal belongs to rank 0, but torch gives many of its loggers handlers that write there."""
    logging.captureWarnings(True)
    for name, logger in logging.root.manager.loggerDict.items():
        if name.partition(".")[0] == "torch" and isinstance(logger, logging.Logger):
            terminal = [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]
            for handler in terminal:
                logger.removeHandler(handler)
                logger.propagate = True


def _logs_specs(folder: Path, started: Path) -> Any:
    """Rank 0 keeps the terminal; the others write to rank-N.out and rank-N.err."""
    from torch.distributed.elastic.multiprocessing.api import LogsDest, LogsSpecs

    class PerRank(LogsSpecs):
        def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
            started.touch()

            def files(kind: str) -> dict[int, str]:
                ranks = {local: int(env["RANK"]) for local, env in envs.items()}
                return {local: str(folder / f"rank-{rank}.{kind}") if rank else "" for local, rank in ranks.items()}

            errors = {local: str(folder / f"rank-{env['RANK']}.json") for local, env in envs.items()}
            return LogsDest(files("out"), files("err"), {}, {}, errors)

        @property
        def root_log_dir(self) -> str:
            return str(folder)

    return PerRank(str(folder))


def _loopback_rendezvous(parameters: Any) -> Any:
    """The c10d rendezvous on 127.0.0.1 only."""
    from torch.distributed import TCPStore
    from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend, dynamic_rendezvous

    from scale.cluster.loopback import ADDRESS, serve_store

    wait = timedelta(seconds=parameters.get_as_int("read_timeout"))

    def store(port: int) -> TCPStore:
        try:
            return serve_store(port, wait)
        except OSError:  # another node of this run on this machine serves it
            return TCPStore(ADDRESS, port, is_master=False, timeout=wait)

    class Loopback(dynamic_rendezvous.DynamicRendezvousHandler):
        def get_backend(self) -> str:
            return "loopback"

        def _create_tcp_store_server(self, master_addr: str, master_port: int) -> TCPStore:
            return store(master_port)

    meeting = store(int(parameters.endpoint.rpartition(":")[2]))
    return Loopback.from_backend(
        parameters.run_id,
        meeting,
        c10d_rendezvous_backend.C10dRendezvousBackend(meeting, parameters.run_id),
        parameters.min_nodes,
        parameters.max_nodes,
        ADDRESS,
        dynamic_rendezvous.RendezvousTimeout(join=timedelta(seconds=parameters.get_as_int("join_timeout"))),
    )


if __name__ == "__main__":
    sys.exit(main())
