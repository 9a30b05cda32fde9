"""What this machine is, and what `auto` means on it."""

from scale.cards import CARDS, Card, card, card_named
from scale.hardware.choices import (
    Choice,
    choose_attention,
    choose_compile,
    choose_kernels,
    choose_loss,
    choose_micro_rows,
    choose_precision,
    choose_recompute,
    has_fp8,
)
from scale.hardware.machine import Hardware, detect, installed, sum_dtype
from scale.hardware.peak import peak_flops

__all__ = [
    "CARDS", "Card", "Choice", "Hardware", "card", "card_named", "choose_attention", "choose_compile", "choose_kernels",
    "choose_loss", "choose_micro_rows", "choose_precision", "choose_recompute", "detect", "has_fp8", "installed",
    "peak_flops", "sum_dtype",
]  # fmt: skip
