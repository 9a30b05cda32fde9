"""The safetensors files of a folder: which they are, and whether they are whole."""

from __future__ import annotations

import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from scale.errors import UsageError

_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")


def check_files(folder: Path) -> None:
    """Raises UsageError for files of weights that are damaged or contradict each other."""
    files = files_of(folder)
    shards = {file.name for file in folder.glob("*.safetensors") if _SHARD.fullmatch(file.name)}
    unread = sorted(shards - {file.name for file in files})
    if unread:
        listed = _INDEX if (folder / _INDEX).is_file() else "model.safetensors"
        raise UsageError(
            f"{folder / unread[0]}: is not listed by {listed} (left over from another model? remove what does "
            "not belong to this one)"
        )
    for file in files:
        if not file.is_file():
            raise UsageError(f"{file}: no such file, but {_INDEX} names it (copy the whole folder again)")
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise UsageError(f"{file}: cut off or no safetensors file ({error}): copy it again") from None


def files_of(folder: Path) -> list[Path]:
    """The files of weights in a folder; none for a repository's name. Raises UsageError for an index that is not one, and
    where there is an index and one whole file, as transformers would take the one and others the other."""
    index, whole = folder / _INDEX, folder / "model.safetensors"
    if index.is_file() and whole.is_file():
        raise UsageError(f"{folder}: holds {whole.name} and {index.name} (two models? remove one of them)")
    if whole.is_file():
        return [whole]
    if not index.is_file():
        if folder.is_dir():
            raise UsageError(f"model.path = {str(folder)!r}: holds neither {whole.name} nor {_INDEX}")
        return []
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [folder / name for name in sorted(set(weight_map.values()))]
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UsageError(
            f"{index}: no index of safetensors files (save the model again with save_pretrained)"
        ) from None
