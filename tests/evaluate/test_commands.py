"""`scale generate`, `scale export`, `scale plot` on real small runs."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from scale.api import build_trainer, load_run
from scale.checkpoint.saved import latest_good
from scale.checkpoint.store import Checkpoints, DamagedCheckpoint
from scale.cli.main import main
from scale.cli.model import _print
from scale.errors import UsageError
from scale.evaluate.generate import Continuation, continuations
from tests.refusal import in_a_process
from tests.test_trainer import run_config

INPUT = {"input_ids": torch.arange(12).view(2, 6)}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    build_trainer(run_config(folder)).fit()
    return folder / "runs" / "tiny"


def test_an_export_loads_with_the_same_logits(run, tmp_path, capsys):
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ours, tokenizer = load_run(run)
    with torch.no_grad():
        assert (ours(**INPUT).logits - theirs(**INPUT).logits).abs().max() <= 1e-5
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("quick fox").input_ids
    assert ids == [tokenizer.eos_token_id, *tokenizer("quick fox").input_ids]  # as documents are stored
    assert theirs.config.eos_token_id == tokenizer.eos_token_id
    assert not list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / "model.safetensors").exists()


def test_an_earlier_checkpoint_can_be_chosen(run):
    newest, earlier = load_run(run)[0], load_run(run, step=10)[0]
    assert not torch.equal(newest.lm_head.weight, earlier.lm_head.weight)
    with pytest.raises(UsageError, match=r"no checkpoint of step 11 \(there are: 10, 20\)"):
        load_run(run, step=11)


def generated(capsys, *words):
    assert main(["generate", *map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_generate_is_seeded_and_the_same_from_an_export(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    made = [
        generated(capsys, model, "--prompt", "the", "--max-new-tokens", "12", "--seed", seed)
        for model, seed in ((run, "1"), (run, "1"), (tmp_path / "out", "1"), (run, "2"))
    ]
    assert made[0] == made[1] == made[2] != made[3] and made[0][0]["prompt"] == "the"


def test_greedy_generation_equals_a_loop_over_argmax(run, capsys):
    (made,) = generated(capsys, run, "--prompt", "seven wizards", "--max-new-tokens", "8", "--temperature", "0")
    model, tokenizer = load_run(run)
    ids = [tokenizer.eos_token_id, *tokenizer("seven wizards").input_ids]  # what a document starts with
    new = []
    for _ in range(8):
        with torch.no_grad():
            new.append(int(model(torch.tensor([ids + new])).logits[0, -1].argmax()))
        if new[-1] == tokenizer.eos_token_id:
            break
    assert made["continuation"] == tokenizer.decode(new, skip_special_tokens=True)
    assert (made["tokens"], made["ended"]) == (len(new), new[-1] == tokenizer.eos_token_id)


def test_the_output_tells_the_prompt_from_its_continuation(run, capsys):
    words = ("--prompt", "two\nlines", "--max-new-tokens", "3", "--temperature", "0", "--top-k", "0")
    (made,) = generated(capsys, run, *words)
    assert main(["generate", str(run), *words]) == 0
    why = "ended by the model" if made["ended"] else "cut at --max-new-tokens"
    assert capsys.readouterr().out == (
        f"--- prompt\ntwo\nlines\n--- continuation ({made['tokens']} tokens, {why})\n{made['continuation']}\n"
    )


def test_a_terminal_obeys_nothing_that_a_model_says(monkeypatch, capsys):
    made = Continuation("a\tprompt", "red \x1b[31m\x9b31m\x07bell\r\nline \U0001f468\u200d\U0001f469", 5, True)
    _print(made)
    assert made.text in capsys.readouterr().out  # a pipe gets what was made
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    _print(made)
    assert capsys.readouterr().out == (
        "\x1b[2m--- prompt\x1b[0m\na\tprompt\n\x1b[2m--- continuation (5 tokens, ended by the model)\x1b[0m\n"
        "red [31m31mbell\nline \U0001f468\u200d\U0001f469\n"
    )


def test_only_the_ends_of_a_models_own_generation_settings_count(run, capsys):
    """Not a repetition penalty that the base model's file has and nobody asked for."""
    model, tokenizer = load_run(run)
    plain = continuations(model, tokenizer, ["the quick"], 12, temperature=0)
    model.generation_config = GenerationConfig(repetition_penalty=5.0, min_new_tokens=12, eos_token_id=[0, 300])
    assert continuations(model, tokenizer, ["the quick"], 12, temperature=0) == plain
    assert model.generation_config.repetition_penalty == 5.0
    with torch.no_grad():
        first = int(model(torch.tensor([[0, *tokenizer("the quick").input_ids]])).logits[0, -1].argmax())
    model.generation_config = GenerationConfig(eos_token_id=[first, 0])
    (made,) = continuations(model, tokenizer, ["the quick"], 12, temperature=0)
    assert made.ended and made.tokens == 1


def test_a_prompt_without_room_for_more_is_refused(run):
    model, tokenizer = load_run(run)
    positions, prompt = model.config.max_position_embeddings, "the " * 2000
    with pytest.raises(UsageError, match=f"behind a prompt of 1 tokens the model has {positions - 1} positions left"):
        continuations(model, tokenizer, [""], positions)
    with pytest.raises(UsageError, match=f"tokens with the start token, but the model has {positions} positions"):
        continuations(model, tokenizer, [prompt * 2], 1)


def test_the_best_checkpoint_is_that_of_the_lowest_held_out_loss(run, tmp_path):
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    newest = latest_good(run / "checkpoints", print)
    state, tensors = newest.state(), {name: torch.zeros(shape) for name, shape in newest.shapes().items()}
    shutil.rmtree(copied / "checkpoints")
    store = Checkpoints(copied / "checkpoints", keep_last=9, keep_best=9)
    for step, loss in ((1, 3.0), (2, 1.0), (3, None), (4, 2.0), (5, float("nan"))):
        store.save(step, {name: tensor + step for name, tensor in tensors.items()}, state, loss)
    store.wait()
    assert load_run(copied, best=True)[0].lm_head.weight.unique().item() == 2
    assert load_run(copied)[0].lm_head.weight.unique().item() == 5
    (copied / "checkpoints" / "step_00000002" / "state.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="step_00000002"):  # another one is not what was asked for
        load_run(copied, best=True)
    for step in (1, 2, 4):
        shutil.rmtree(copied / "checkpoints" / f"step_0000000{step}")
    with pytest.raises(UsageError, match=r"--best: no checkpoint in .* has a held-out loss \(there are: 3, 5;"):
        load_run(copied, best=True)


@pytest.mark.parametrize("place", ["", "checkpoints/step_00000099", "model", "model/new", "link/new", "config.yaml"])
def test_an_export_never_lands_on_what_it_is_made_from(run, place, capsys):
    if place.startswith("link") and not (run / "link").exists():
        (run / "link").symlink_to(run / "checkpoints")
    before = sorted(run.rglob("*"))
    assert main(["export", str(run), "--out", str(run / place)]) == 2
    assert "input" in capsys.readouterr().err and sorted(run.rglob("*")) == before


def test_an_export_never_replaces_anything(run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name in ("empty", "dangling"):
        assert main(["export", str(run), "--out", str(tmp_path / name)]) == 2
        assert "exists already" in capsys.readouterr().err


def test_pictures_are_not_put_among_what_they_are_drawn_from(run, capsys):
    for place in (run, run / "checkpoints", run / "model" / "x", run / "metrics.jsonl"):
        assert main(["plot", str(run), "--out", str(place)]) == 2
        assert "input" in capsys.readouterr().err


def test_verbs_print_what_their_user_needs(run, tmp_path):
    """Not what libraries say: in a process of its own, as loggers and warnings belong to the process."""
    done = in_a_process("export", run, "--out", tmp_path / "out")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'out'}\n", "")


def test_plot_writes_pictures(run, capsys):
    assert main(["plot", str(run)]) == 0
    written = capsys.readouterr().out.split()
    assert written and all(path.endswith(".png") for path in written)


@pytest.mark.slow
def test_what_a_killed_export_left_goes_with_the_next_one(run, tmp_path):
    command = [Path(sys.executable).with_name("scale"), "export", run, "--out", tmp_path / "out"]
    killed = subprocess.Popen(command)
    while not list(tmp_path.glob(".out.*.tmp")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert len(list(tmp_path.iterdir())) == 1
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture(scope="module")
def base(run, tmp_path_factory):
    """A model in bf16 with generation settings of its own, which transformers would refuse to write."""
    folder = tmp_path_factory.mktemp("base") / "base"
    main(["export", str(run), "--out", str(folder), "--dtype", "bf16"])
    settings = {"bos_token_id": 0, "eos_token_id": [0, 301], "pad_token_id": 0, "do_sample": False, "temperature": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


def test_lora_run_exports_as_adapter_and_merged_with_the_same_logits(base, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(base.parent)
    adapter = {"kind": "lora", "rank": 4, "targets": ["q_proj", "lm_head"]}
    build_trainer(run_config(tmp_path, "optim.lr=0.02", "name=lora", model={"path": "base"}, adapter=adapter)).fit()
    lora = tmp_path / "runs" / "lora"
    trained, _ = load_run(lora)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with torch.no_grad():
        untrained = plain(**INPUT).logits
    for words in (["merged", "--merge", "--dtype", "fp32"], ["small", "--merge"], ["adapter"]):
        assert main(["export", str(lora), "--out", str(tmp_path / words[0]), *words[1:]]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "small").dtype == torch.bfloat16  # that of the base model
    from peft import PeftModel

    monkeypatch.chdir("/")
    loaded = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    with torch.no_grad():
        expected = trained(**INPUT).logits
        assert torch.allclose(merged(**INPUT).logits, expected, atol=1e-4)
        assert torch.allclose(loaded(**INPUT).logits, expected, atol=1e-4)
        assert not torch.allclose(untrained, expected, atol=1e-2)
    capsys.readouterr()
    words = ("--prompt", "seven", "--max-new-tokens", "10", "--temperature", "0")
    assert generated(capsys, tmp_path / "adapter", *words) == generated(capsys, tmp_path / "merged", *words)
    for folder in ("merged", "adapter"):
        assert json.loads((tmp_path / folder / "generation_config.json").read_text())["eos_token_id"] == [0, 301]
    assert main(["generate", str(tmp_path / "adapter"), "--best"]) == 2
    (tmp_path / "adapter" / "adapter_model.safetensors").rename(tmp_path / "adapter" / "adapter_model.bin")
    assert main(["generate", str(tmp_path / "adapter")]) == 2
    stated = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_model.bin").rename(tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(
        json.dumps(stated | {"base_model_name_or_path": "./gone"})
    )
    assert main(["generate", str(tmp_path / "adapter")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert (
        len(said) == 3 and "is an adapter, which has no steps" in said[0] and "no adapter_model.safetensors" in said[1]
    )
    assert "its base model cannot be loaded: model.path = './gone': no such folder" in said[2]


def test_a_tuned_model_keeps_dtype_and_settings_of_a_base_that_is_gone(base, tmp_path):
    shutil.copytree(base, tmp_path / "base")
    build_trainer(run_config(tmp_path, name="tuned", model={"path": str(tmp_path / "base")}, train={"steps": 2})).fit()
    shutil.rmtree(tmp_path / "base")
    assert main(["export", str(tmp_path / "runs" / "tuned"), "--out", str(tmp_path / "out")]) == 0
    assert {t.dtype for t in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    settings = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [0, 301] and settings["temperature"] == 0.6
