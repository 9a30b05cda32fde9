"""The Hugging Face Hub where there is no network: known at once, in place of a minute of retries."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from threading import Thread
from urllib.parse import urlsplit

from scale.errors import UsageError

SECONDS = 3.0
"""How long the Hub may take to accept a connection."""
_MARKS = ("config.json", "tokenizer.json", "tokenizer_config.json")
"""Files of which a model or a tokenizer that was downloaded has one."""


def need(names: Mapping[str, str], more: Iterable[str] = ()) -> None:
    """See that what these config keys name is here or can be had; libraries are told not to try where the Hub cannot be
    reached. `names`: key -> a folder, a file, or a name on the Hub; `more`: names that a library may look for as well.

    Raises UsageError for what `names` has that is neither here nor downloaded nor to be had.
    """
    wanted = {key: name for key, name in names.items() if _on_hub(name)}
    if not wanted and not any(map(_on_hub, more)):
        return
    asked = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    if not asked and reachable():
        return
    _go_offline()
    why = "HF_HUB_OFFLINE is set" if asked else f"{_host()} cannot be reached"
    for key, name in wanted.items():
        if not _downloaded(name):
            raise UsageError(
                f"{key} = {name!r}: no such folder, not downloaded before, and {why} "
                f"(give a local folder, or run `hf download {name}` where there is a network)"
            )


def _on_hub(name: str) -> bool:
    local = Path(name).expanduser()
    return not local.exists() and local.suffix != ".json" and not name.startswith(("/", ".", "~"))


@lru_cache
def reachable() -> bool:
    """Whether the Hub accepts connections. Taken for granted behind a proxy, which only its own client can ask."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY")):
        return True
    found: list[bool] = []
    asking = Thread(target=lambda: found.append(_connects()), daemon=True)  # looking up a name knows no timeout
    asking.start()
    asking.join(SECONDS)
    return found == [True]


def _connects() -> bool:
    address = urlsplit(_endpoint())
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _host() -> str:
    return urlsplit(_endpoint()).netloc


def _go_offline() -> None:
    """For this process and those it starts; libraries that are imported already have read the environment."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    for library in ("huggingface_hub.constants", "datasets.config"):
        if library in sys.modules:
            sys.modules[library].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]


def _downloaded(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return any(isinstance(try_to_load_from_cache(name, mark), str) for mark in _MARKS)
    except HFValidationError:  # no name at all: the library that reads it says so
        return True
