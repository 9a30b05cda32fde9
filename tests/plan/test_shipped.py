"""Every config that comes with the framework can be planned; what cannot without a network is refused at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save_file

from scale import hub
from scale.cli.main import main
from scale.config import load_config
from scale.errors import UsageError
from scale.plan.plan import make_plan
from scale.plan.settle import planned

ROOT = Path(__file__).parents[2]
RUNS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path.name != "base.yaml"]
SMOL = {"model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
"""The sizes of the Hub model that configs/finetune/lora.yaml names."""
DEAD_HUB = "http://127.0.0.1:9"
"""Nothing listens on the port `discard`."""


def words_for(path: Path, folder: Path) -> list[str]:
    """What a config needs to be planned without data or a network: a vocabulary, a length, a model that is here."""
    config = path.read_text()
    words = []
    if "preset: tiny" in config or "demo.yaml" in config:
        words.append("model.overrides.vocab_size=4096")
    if "epochs" in config:
        words += ["train.epochs=null", "train.steps=100"]
    if "HuggingFaceTB" in config:
        (folder / "config.json").write_text(json.dumps(SMOL))
        save_file({}, folder / "model.safetensors")  # a plan reads no weights
        words += [f"model.path={folder}", f"data.tokenizer.path={folder}"]
    return words


def shown(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=[] if p.stem in ("demo", "predict", "lora") else pytest.mark.slow) for p in RUNS],
    ids=shown,
)
def test_every_shipped_config(path: Path, gpus: int, tmp_path: Path) -> None:
    made = make_plan(load_config(path, words_for(path, tmp_path)), gpus, planned("h100"))
    assert made.memory.peak == sum(made.memory.at_peak.values()) >= sum(made.memory.held.values()) * 0.9
    assert made.fits is not (path.stem == "7b" and gpus == 1)  # 112 GB of states
    assert made.days > 0 and made.settled.choices.strategy.value == ("single" if gpus == 1 else "fsdp")


@pytest.mark.parametrize("verb", [
    ["plan", "configs/finetune/lora.yaml", "--gpus", "1", "--gpu", "h100"],
    ["train", "configs/finetune/lora.yaml", "--dry-run"],
], ids=lambda verb: verb[0])  # fmt: skip
def test_a_hub_model_without_a_network_is_one_line(verb: list[str], tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower() and not k.startswith("HF_")}
    environment |= {"HF_ENDPOINT": DEAD_HUB, "HF_HOME": str(tmp_path)}
    words = [sys.executable, "-m", "scale.cli.main", *verb]
    ran = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.splitlines() == [
        "scale: error: model.path = 'HuggingFaceTB/SmolLM2-135M': no such folder, not downloaded before, and 127.0.0.1:9 "
        "cannot be reached (give a local folder, or run `hf download HuggingFaceTB/SmolLM2-135M` where there is a network)"
    ]


@pytest.fixture
def dead_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No Hub; the folder of what was downloaded."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "")  # put back what a test sets
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def downloaded(cache: Path, name: str, content: dict[str, object]) -> None:
    """A config.json as the Hub's client keeps it."""
    model, commit = cache / f"models--{name.replace('/', '--')}", "a" * 40
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text(commit)
    (model / "snapshots" / commit).mkdir(parents=True)
    (model / "snapshots" / commit / "config.json").write_text(json.dumps(content))


def test_what_was_downloaded_before_is_planned_without_a_network(dead_hub: Path) -> None:
    downloaded(dead_hub, "org/small", SMOL | {"num_hidden_layers": 2})
    words = ["model.path=org/small", "train.epochs=null", "train.steps=100"]
    made = make_plan(load_config(ROOT / "configs/finetune/lora.yaml", words), 1, planned("h100"))
    assert made.fits and made.size.trainable < made.size.total / 10
    assert os.environ["HF_HUB_OFFLINE"] == "1"  # for every library, and for processes that this one starts


@pytest.mark.parametrize("name", ["org/small", "small", "org/../small", "no name at all"])
def test_names_that_are_not_here(dead_hub: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"model.path={name}", "train.epochs=null", "train.steps=100"]
    assert main(["plan", str(ROOT / "configs/finetune/lora.yaml"), *words, "--gpus", "1", "--gpu", "h100"]) == 2
    assert f"model.path = {name!r}" in capsys.readouterr().err


def test_folders_and_files_ask_no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("asked"))
    hub.need({"model.path": str(tmp_path), "data.tokenizer.path": "/nowhere/tokenizer.json"}, ["./here", "~/there"])


def test_reachable_is_found_out_by_connecting(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    hub.reachable.cache_clear()
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        assert hub.reachable()
    hub.reachable.cache_clear()
    assert not hub.reachable()
    hub.reachable.cache_clear()
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")  # its own client knows how to ask it
    assert hub.reachable()
    hub.reachable.cache_clear()


def test_a_set_offline_mode_is_named(monkeypatch: pytest.MonkeyPatch, dead_hub: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"org/small.*HF_HUB_OFFLINE is set"):
        hub.need({"model.path": "org/small"})
