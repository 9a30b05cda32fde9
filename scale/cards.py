"""GPUs by name: the figures of the vendors' datasheets, without sparsity."""

from __future__ import annotations

import re
from dataclasses import dataclass
from difflib import get_close_matches

from scale.errors import UsageError


@dataclass(frozen=True)
class Card:
    """One GPU. `names` are patterns of the name its driver reports; `memory` is in GiB, as the driver reports it, rounded
    down; `bf16` and `fp8` are dense peaks in TFLOP/s with fp32 accumulation, None where the card has no such unit;
    `bandwidth` is of its memory, and `link` to the other GPUs of its machine, each way (NVLink where the card has it, else
    PCIe), both in GB/s."""

    title: str
    names: str
    memory: int
    capability: tuple[int, int]
    bf16: float | None
    fp8: float | None
    bandwidth: int
    link: int


# Datasheets of NVIDIA (A100, H100, H200, HGX B200, L4, L40S, A10, T4, V100, RTX A6000, RTX 6000 Ada) and the architecture
# whitepapers GA102, AD102 and RTX Blackwell for the GeForce cards; figures "with sparsity" are halved. A10G: AWS's 70.
# Links: half of what the datasheets name as NVLink or PCIe bandwidth "total" or "bidirectional"; bridges between two cards
# (NVL, RTX) count as PCIe. The first row whose pattern matches counts.
CARDS = {
    "a100": Card("A100 SXM 80GB", r"A100.SXM.*80GB", 79, (8, 0), 312, None, 2039, 300),
    "a100-pcie": Card("A100 80GB PCIe", r"A100 80GB PCIe", 79, (8, 0), 312, None, 1935, 32),
    "a100-40gb": Card("A100 40GB", r"A100.*40GB", 39, (8, 0), 312, None, 1555, 32),
    "h100-nvl": Card("H100 NVL", r"H100 NVL", 93, (9, 0), 835, 1671, 3938, 64),
    "h100-pcie": Card("H100 PCIe", r"H100 PCIe", 79, (9, 0), 756, 1513, 2000, 64),
    "h100": Card("H100 SXM", r"H100 80GB HBM3|H100.SXM", 79, (9, 0), 989, 1979, 3350, 450),
    "h200-nvl": Card("H200 NVL", r"H200 NVL", 139, (9, 0), 835, 1671, 4800, 64),
    "h200": Card("H200 SXM", r"H200", 139, (9, 0), 989, 1979, 4800, 450),
    "b200": Card("B200", r"\bB200", 178, (10, 0), 2250, 4500, 7700, 900),
    "l40s": Card("L40S", r"L40S", 44, (8, 9), 362, 733, 864, 32),
    "l4": Card("L4", r"L4$", 22, (8, 9), 121, 242, 300, 32),
    "rtx6000-ada": Card("RTX 6000 Ada", r"RTX 6000 Ada", 47, (8, 9), 364, 728, 960, 32),
    "a6000": Card("RTX A6000", r"RTX A6000", 47, (8, 6), 155, None, 768, 32),
    "a10g": Card("A10G", r"A10G", 22, (8, 6), 70, None, 600, 32),
    "a10": Card("A10", r"A10$", 22, (8, 6), 125, None, 600, 32),
    "5090": Card("RTX 5090", r"RTX 5090$", 31, (12, 0), 209.5, 419, 1792, 64),
    "4090": Card("RTX 4090", r"RTX 4090$", 23, (8, 9), 165.2, 330.3, 1008, 32),
    "3090": Card("RTX 3090", r"RTX 3090$", 23, (8, 6), 71, None, 936, 32),
    "v100": Card("V100", r"V100", 15, (7, 0), None, None, 900, 16),
    "t4": Card("T4", r"\bT4$", 14, (7, 5), None, None, 320, 16),
}


def card_named(name: str) -> Card | None:
    """The card whose driver reports this name; None for an unknown one and for a part of one (MIG)."""
    if "MIG" in name:
        return None
    return next((card for card in CARDS.values() if re.search(card.names, name)), None)


def card(short: str) -> Card:
    """A card that need not be here, by its short name ("h100"). Raises UsageError with those that can be planned with."""
    found = CARDS.get(short.lower())
    if found is None:
        near = get_close_matches(short.lower(), _plannable(), n=1)
        meant = f"did you mean {near[0]}? " if near else ""
        raise UsageError(f"GPU {short!r} is not known ({meant}choose one of {', '.join(_plannable())})")
    return found


def card_to_plan(short: str) -> Card:
    """The same for `scale plan --gpu`, which counts from a card's bf16 peak. Raises UsageError also for one without."""
    found = card(short)
    if found.bf16 is None:
        raise UsageError(
            f"--gpu {short}: its datasheet knows no bf16 peak, from which FLOPs become days "
            f"(choose one of {', '.join(_plannable())})"
        )
    return found


def _plannable() -> list[str]:
    return [name for name, known in CARDS.items() if known.bf16 is not None]
