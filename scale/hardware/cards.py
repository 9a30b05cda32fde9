"""GPUs by name: the figures of the vendors' datasheets, without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass

from scale.errors import UsageError


@dataclass(frozen=True)
class Card:
    """One GPU. `names` are patterns of the name its driver reports; `memory` is in GiB, as the driver reports it, rounded
    down; `bf16` and `fp8` are dense peaks in TFLOP/s with fp32 accumulation, None where the card has no such unit;
    `bandwidth` is of its memory, in GB/s."""

    title: str
    names: str
    memory: int
    capability: tuple[int, int]
    bf16: float | None
    fp8: float | None
    bandwidth: int


# Datasheets of NVIDIA (A100, H100, H200, HGX B200, L4, L40S, A10, T4, V100, RTX A6000, RTX 6000 Ada) and the architecture
# whitepapers GA102, AD102 and RTX Blackwell for the GeForce cards; figures "with sparsity" are halved. A10G: AWS's 70.
# The first row whose pattern matches counts.
CARDS = {
    "a100": Card("A100 SXM 80GB", r"A100.SXM.*80GB", 79, (8, 0), 312, None, 2039),
    "a100-pcie": Card("A100 80GB PCIe", r"A100 80GB PCIe", 79, (8, 0), 312, None, 1935),
    "a100-40gb": Card("A100 40GB", r"A100.*40GB", 39, (8, 0), 312, None, 1555),
    "h100-nvl": Card("H100 NVL", r"H100 NVL", 93, (9, 0), 835, 1671, 3938),
    "h100-pcie": Card("H100 PCIe", r"H100 PCIe", 79, (9, 0), 756, 1513, 2000),
    "h100": Card("H100 SXM", r"H100 80GB HBM3|H100.SXM", 79, (9, 0), 989, 1979, 3350),
    "h200-nvl": Card("H200 NVL", r"H200 NVL", 139, (9, 0), 835, 1671, 4800),
    "h200": Card("H200 SXM", r"H200", 139, (9, 0), 989, 1979, 4800),
    "b200": Card("B200", r"\bB200", 178, (10, 0), 2250, 4500, 7700),
    "l40s": Card("L40S", r"L40S", 44, (8, 9), 362, 733, 864),
    "l4": Card("L4", r"L4$", 22, (8, 9), 121, 242, 300),
    "rtx6000-ada": Card("RTX 6000 Ada", r"RTX 6000 Ada", 47, (8, 9), 364, 728, 960),
    "a6000": Card("RTX A6000", r"RTX A6000", 47, (8, 6), 155, None, 768),
    "a10g": Card("A10G", r"A10G", 22, (8, 6), 70, None, 600),
    "a10": Card("A10", r"A10$", 22, (8, 6), 125, None, 600),
    "5090": Card("RTX 5090", r"RTX 5090$", 31, (12, 0), 209.5, 419, 1792),
    "4090": Card("RTX 4090", r"RTX 4090$", 23, (8, 9), 165.2, 330.3, 1008),
    "3090": Card("RTX 3090", r"RTX 3090$", 23, (8, 6), 71, None, 936),
    "v100": Card("V100", r"V100", 15, (7, 0), None, None, 900),
    "t4": Card("T4", r"\bT4$", 14, (7, 5), None, None, 320),
}


def card_named(name: str) -> Card | None:
    """The card whose driver reports this name; None for an unknown one and for a part of one (MIG)."""
    if "MIG" in name:
        return None
    return next((card for card in CARDS.values() if re.search(card.names, name)), None)


def card(short: str) -> Card:
    """A card that need not be here, by its short name ("h100"). Raises UsageError with the known ones."""
    try:
        return CARDS[short.lower()]
    except KeyError:
        raise UsageError(f"GPU {short!r} is not known: choose one of {', '.join(CARDS)}") from None
