"""torch's TCP store, listening on 127.0.0.1 only where all ranks are on this machine: by itself it listens everywhere."""

from __future__ import annotations

import socket
from datetime import timedelta

from torch.distributed import TCPStore

ADDRESS = "127.0.0.1"


def serve_store(port: int, wait: timedelta) -> TCPStore:
    """The server (and a client of it). Port 0: any free one. Raises OSError if the port is taken."""
    listener = socket.socket()
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((ADDRESS, port))
        listener.listen()  # two sockets may be bound to a port at once, but only one listens
    except OSError:
        listener.close()
        raise
    port = listener.getsockname()[1]
    descriptor = listener.detach()
    return TCPStore(ADDRESS, port, is_master=True, timeout=wait, master_listen_fd=descriptor, wait_for_workers=False)
