"""Does an exported folder give the same logits as the run it came from? Usage: check_export.py RUN FOLDER."""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from scale.api import load_run

disable_progress_bar()

run, folder = sys.argv[1:3]
ours, _ = load_run(run)
theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
ids_BL = AutoTokenizer.from_pretrained(folder)("def add(a, b):\n    return a + b\n", return_tensors="pt").input_ids
with torch.no_grad():
    difference = (ours(ids_BL).logits - theirs(ids_BL).logits).abs().max().item()
print(f"{folder}: loads with AutoModelForCausalLM; largest difference of a logit to {run}: {difference:.1e}")
sys.exit(difference > 1e-5)
