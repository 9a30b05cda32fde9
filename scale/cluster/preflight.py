"""`launch/preflight.py`: may these machines train together? Names each rank that is not fit, within a minute."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from scale.cluster.options import Parser, interface_of, own_address
from scale.errors import EXIT_FAILED, ScaleError, UsageError

SECONDS = 60
PORT = 29400
RANK_NAMES = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
SLURM_NAMES = {"rank": "SLURM_PROCID", "world_size": "SLURM_NTASKS", "local_rank": "SLURM_LOCALID"}
EPILOG = """\
examples:
  launch/preflight.py --ranks-per-node 8 --gpus --folder runs        one machine
  launch/preflight.py --nodes 2 --node-rank 0 --host 10.0.0.1 --ranks-per-node 8 --gpus --folder /shared/runs
  launch/preflight.py --nodes 2 --node-rank 1 --host 10.0.0.1 --ranks-per-node 8 --gpus --folder /shared/runs
  srun --ntasks-per-node=8 launch/preflight.py --gpus --folder /shared/runs --host "$(hostname)"
  torchrun --nproc-per-node 8 launch/preflight.py --gpus --folder runs

Started on its own or by srun it names machines that never appear; torchrun itself waits for those.
exit codes: 0 ready, 1 not ready (the last lines name rank, machine, what is wrong and what to do), 2 wrong argument
"""


def main(arguments: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Entry point: one rank, if the environment says which, else the ranks of this machine."""
    start = time.monotonic()
    try:
        args = _parser().parse_args(arguments)
        if args.seconds < 5:
            raise UsageError(f"--seconds {args.seconds:g}: expected at least 5")
        names = next((n for n in (RANK_NAMES, SLURM_NAMES) if all(name in environment for name in n.values())), None)
        if names is None or (names is SLURM_NAMES and args.nodes is not None):
            return _spawn(args, start)
        return _rank(args, start, {key: int(environment[name]) for key, name in names.items()}, environment)
    except ScaleError as error:
        print(f"preflight: error: {error}", file=sys.stderr)
        return error.exit_code


def _rank(args: argparse.Namespace, start: float, who: Mapping[str, int], environment: Mapping[str, str]) -> int:
    host = environment.get("MASTER_ADDR") or args.host
    if not host:
        raise UsageError("MASTER_ADDR is not set: say --host, the address of the machine of rank 0")
    if not args.gpus and "GLOO_SOCKET_IFNAME" not in os.environ:
        interface = interface_of(own_address(host))
        if interface is not None:
            os.environ["GLOO_SOCKET_IFNAME"] = interface
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # what it would say is in the verdict
    from scale.cluster.preflight_ranks import Setup, check

    code = check(
        Setup(
            **who,
            host=host,
            port=int(environment.get("MASTER_PORT") or args.port),
            folder=args.folder,
            gpus=args.gpus,
            megabytes=args.megabytes or (64 if args.gpus else 16),
            min_gbps=args.min_gbps,
            deadline=start + args.seconds - 1,
            start=start,
            agent_store=environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        )
    )
    sys.stdout.flush()
    os._exit(code)  # a thread may still wait for a collective that never completes


def _spawn(args: argparse.Namespace, start: float) -> int:
    """Start the ranks of this machine and end them all in time, also stopped ones."""
    nodes, node_rank = args.nodes or 1, args.node_rank
    if not 0 <= node_rank < nodes:
        raise UsageError(f"--node-rank {node_rank}: expected 0 to {nodes - 1} with --nodes {nodes}")
    if nodes > 1 and not args.host:
        raise UsageError(f"--nodes {nodes} needs --host, the address of the machine with --node-rank 0")
    here: list[subprocess.Popen[bytes]] = []
    try:
        for local in range(args.ranks_per_node):
            who = {
                "RANK": node_rank * args.ranks_per_node + local,
                "WORLD_SIZE": nodes * args.ranks_per_node,
                "LOCAL_RANK": local,
                "MASTER_ADDR": args.host or "127.0.0.1",
                "MASTER_PORT": args.port,
            }
            command = [sys.executable, *args.program, *_repeated(args)]
            here.append(subprocess.Popen(command, env=os.environ | {key: str(value) for key, value in who.items()}))
        codes = [process.wait(max(0.1, start + args.seconds - time.monotonic())) for process in here]
        return EXIT_FAILED if any(codes) else 0
    except subprocess.TimeoutExpired:
        return EXIT_FAILED  # rank 0, or in its absence every other rank, has said why
    finally:
        for process in here:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()


def _repeated(args: argparse.Namespace) -> list[str]:
    options = ["--folder", str(args.folder), "--seconds", str(args.seconds), "--min-gbps", str(args.min_gbps)]
    options += ["--megabytes", str(args.megabytes)] if args.megabytes else []
    return options + (["--gpus"] if args.gpus else [])


def _parser() -> Parser:
    parser = Parser(
        prog="launch/preflight.py",
        description="Check that all ranks of a run to come can work together: machines, versions, clocks, folder, network.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--folder", type=Path, required=True, help="folder of the runs, which all machines must share")
    parser.add_argument("--gpus", action="store_true", help="each rank must have a GPU; collectives over NCCL")
    parser.add_argument(
        "--seconds", type=float, default=SECONDS, help="end after this long whatever hangs (%(default)s)"
    )
    parser.add_argument(
        "--min-gbps", type=float, default=0.0, metavar="X", help="least bus bandwidth in GB/s (10^9 bytes)"
    )
    parser.add_argument(
        "--megabytes", type=int, metavar="M", help="size of what is exchanged, in MiB (GPUs 64, CPUs 16)"
    )
    parser.add_argument("--ranks-per-node", type=int, default=1, metavar="N", help="processes on this machine")
    parser.add_argument("--nodes", type=int, metavar="N", help="machines that take part")
    parser.add_argument("--node-rank", type=int, default=0, metavar="R", help="this machine among them, from 0")
    parser.add_argument("--host", help="address of the machine of rank 0")
    parser.add_argument("--port", type=int, default=PORT, metavar="P", help="free port there (%(default)s)")
    parser.set_defaults(program=["-m", "scale.cluster.preflight"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
