"""Tests on real GPUs. `GPU_TESTS_ON=cpu pytest tests/gpu` runs on a CPU what can run there, to try the tests themselves."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON", "cuda")
GPU = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs CUDA")]
"""Marks of every file here."""
only_cuda = pytest.mark.skipif(DEVICE != "cuda" or not torch.cuda.is_available(), reason="needs CUDA")
