"""Options of `launch/torchrun.sh`: from the command line, else the environment, else this machine."""

from __future__ import annotations

import argparse
import fcntl
import os
import socket
import struct
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from scale.errors import UsageError

PORT = 29500
LAST_PORT = 65529
JOIN_SECONDS = 45
"""Together with starting Python and torch less than a minute."""

EPILOG = """\
examples:
  launch/torchrun.sh configs/demo.yaml                          all GPUs of this machine
  launch/torchrun.sh --gpus 4 configs/demo.yaml train.steps=50  four of them
  launch/torchrun.sh --ranks-per-node 2 configs/demo.yaml       two processes on CPUs
  launch/torchrun.sh --nodes 2 --node-rank 0 --host 10.0.0.1 configs/demo.yaml   on the first machine
  launch/torchrun.sh --nodes 2 --node-rank 1 --host 10.0.0.1 configs/demo.yaml   on the second one

exit codes: 0 done, 1 failed, 2 wrong config or argument, 75 stopped on request (run the same command again)
"""


@dataclass(frozen=True)
class Launch:
    """Who takes part. `port` 0: any free one (only on a single node)."""

    ranks_per_node: int
    nodes: int = 1
    node_rank: int = 0
    host: str = "127.0.0.1"
    port: int = 0
    local_addr: str | None = "127.0.0.1"
    identity: str = "run"
    join_seconds: int = JOIN_SECONDS
    gpus: str | None = None
    """What asks for a GPU for each rank ("--gpus 2"), in words; None if the ranks were asked for as such."""


class Parser(argparse.ArgumentParser):
    """Raises UsageError instead of printing pages."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see `{self.prog} --help`)")


def read_launch(arguments: Sequence[str] | None, environment: Mapping[str, str]) -> tuple[Launch, argparse.Namespace]:
    """Parse. Raises UsageError for wrong or missing values."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    args.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
    unknown = [word for word in rest if word not in args.overrides]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    nodes = _number(args.nodes, "--nodes", environment, ("NNODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES"), 1) or 1
    if args.gpus and args.ranks_per_node:
        raise UsageError(
            "--gpus and --ranks-per-node: say one of them (ranks with a GPU each, or ranks wherever they run)"
        )
    ranks = _number(args.ranks_per_node, "--ranks-per-node", environment, (), 1)
    gpus = None
    if ranks is None:
        ranks, gpus = _gpus(args.gpus, environment)
    identity = args.id or _identity(environment)
    port = _number(args.port, "--port", environment, ("MASTER_PORT",), 1) or PORT
    if port > LAST_PORT:
        raise UsageError(f"--port {port}: expected 1 to {LAST_PORT} (the six after it are used as well)")
    if nodes == 1:
        return Launch(ranks, identity=identity, join_seconds=args.join_seconds, gpus=gpus), args
    node_rank = _number(args.node_rank, "--node-rank", environment, ("NODE_RANK", "SLURM_NODEID"), 0)
    if node_rank is None or node_rank >= nodes:
        raise UsageError(f"--nodes {nodes} needs --node-rank 0 to {nodes - 1}, another one on each (got {node_rank})")
    host = args.host or environment.get("MASTER_ADDR")
    if not host:
        raise UsageError(f"--nodes {nodes} needs --host: the address of the first node, the same on each")
    return Launch(
        ranks,
        nodes,
        node_rank,
        host,
        port,
        args.local_addr or own_address(host),
        identity,
        args.join_seconds,
        gpus,
    ), args


def own_address(host: str) -> str:
    """The address of this machine by which `host` reaches it: that of the route to it. Raises UsageError."""
    try:
        address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(address[0], socket.SOCK_DGRAM) as probe:
            probe.connect(address[4])  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(f"--host {host}: not a reachable address from here: {error.strerror or error}") from None


def interface_of(address: str | None) -> str | None:
    """The network interface that has this IPv4 address: gloo else takes what the hostname means, often loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    return name
    return None


_SIOCGIFADDR = 0x8915


def _parser() -> Parser:
    parser = Parser(
        prog="launch/torchrun.sh",
        description="Train with several processes on this node, alone or together with other nodes.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, help="YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="values that replace those of the file")
    parser.add_argument(
        "--gpus", metavar="N", help="GPUs of this node, a process on each (GPUS_PER_NODE; default: all that it has)"
    )
    parser.add_argument(
        "--ranks-per-node", metavar="N", help="processes on this node, wherever they run; on CPUs it must be said"
    )
    parser.add_argument("--nodes", metavar="N", help="machines that take part (NNODES; default 1)")
    parser.add_argument("--node-rank", metavar="R", help="this machine among them, from 0 (NODE_RANK)")
    parser.add_argument("--host", help="address of the first machine (MASTER_ADDR)")
    parser.add_argument(
        "--port", metavar="P", help=f"free port there, and the six after it (MASTER_PORT; default {PORT})"
    )
    parser.add_argument(
        "--local-addr", metavar="A", help="address of this machine for the others (default: that of the route)"
    )
    parser.add_argument(
        "--id", help="the same word on all nodes, another for each run on these machines (SLURM_JOB_ID)"
    )
    parser.add_argument(
        "--join-seconds", type=int, default=JOIN_SECONDS, metavar="S", help="wait so long for other nodes (%(default)s)"
    )
    parser.add_argument("--new", action="store_true", help="start a new run named NAME_YYYYmmdd_HHMMSS")
    parser.add_argument("--allow-change", default="", metavar="KEYS", help="as for `scale train`")
    return parser


def _gpus(given: str | None, environment: Mapping[str, str]) -> tuple[int, str]:
    """How many GPUs were asked for, and in which words. `check_gpus` looks whether they are there."""
    names = ("GPUS_PER_NODE", "SLURM_GPUS_ON_NODE")
    asked = _number(given, "--gpus", environment, names, 1)
    if asked is None:
        return _own_gpus(), "all GPUs (the default)"
    return asked, f"--gpus {given}" if given else next(f"{n} = {environment[n]}" for n in names if environment.get(n))


def check_gpus(wanted: int, words: str, device: str) -> None:
    """Raises UsageError where ranks that were asked for with a GPU each would run without. `device`: compute.device."""
    cpu = "--ranks-per-node starts processes without"
    if device not in ("auto", "cuda"):
        raise UsageError(f"{words}: but compute.device = {device!r}, which uses none ({cpu})")
    import torch

    count = torch.cuda.device_count()
    if wanted > count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = "" if visible is None else f", CUDA_VISIBLE_DEVICES = {visible!r}"
        raise UsageError(f"{words}: this machine shows {count} GPUs to torch{hidden} ({cpu})")


def _number(
    given: str | None, option: str, environment: Mapping[str, str], names: Sequence[str], least: int
) -> int | None:
    """Of the option, else of the first variable that is set."""
    sources = [(option, given), *((name, environment.get(name)) for name in names)]
    source, text = next(((s, t) for s, t in sources if t), (option, None))
    if text is None:
        return None
    if not text.isdigit() or int(text) < least:
        raise UsageError(f"{source} = {text!r}: expected a whole number of at least {least}")
    return int(text)


def _own_gpus() -> int:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("this machine shows no GPU to torch; for processes on CPUs say how many: --ranks-per-node 2")
    return torch.cuda.device_count()


def _identity(environment: Mapping[str, str]) -> str:
    """The Slurm job and how often it was requeued; without Slurm a constant, as all nodes must find the same word."""
    job = environment.get("SLURM_JOB_ID")
    return f"{job}r{environment.get('SLURM_RESTART_COUNT', '0')}" if job else "run"
