"""Which documents are held out: decided by the hash of their content, so that more data moves no document.

(But for the one that is moved to an otherwise empty side, while there is nothing better.)
"""

from __future__ import annotations

import hashlib

import numpy as np

from scale.errors import UsageError

_SPAN = 2.0**64


def hash_of(content: bytes) -> int:
    """64 bits of blake2b."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def below(hash_64: int, fraction: float) -> bool:
    """Is a document with this hash held out?"""
    return hash_64 / _SPAN < fraction


def held_out_mask(hashes: np.ndarray, fraction: float, place: str) -> np.ndarray:
    """(N,) uint64 hashes -> (N,) bool, true for held-out documents.

    With a fraction above 0 at least one document is held out and at least one stays: the one with the lowest hash goes, or
    the one with the highest hash stays. Raises UsageError where there is only one document.
    """
    held = hashes / _SPAN < fraction
    if fraction == 0:
        return held
    if np.all(hashes == hashes[0]):
        raise too_few(fraction, place)
    if not held.any():
        held = hashes == hashes.min()
    elif held.all():
        held = hashes < hashes.max()
    return held


def too_few(fraction: float, place: str) -> UsageError:
    """The error for a source that cannot be divided."""
    return UsageError(
        f"{place}: data.held_out.fraction = {fraction:g}, but there is only one distinct document, so nothing can be held "
        "out; cut the source into more documents (split: paragraph) or set the fraction to 0"
    )
