"""`scale generate`, `scale export`, `scale plot` on real small runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scale.api import build_trainer, load_run
from scale.cli.main import main
from scale.errors import UsageError
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
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("quick fox").input_ids == tokenizer("quick fox").input_ids
    assert theirs.config.eos_token_id == tokenizer.eos_token_id
    assert not list((tmp_path / "out").glob("*.bin")) and (tmp_path / "out" / "model.safetensors").exists()


def test_an_earlier_checkpoint_can_be_chosen(run):
    newest, earlier = load_run(run)[0], load_run(run, step=10)[0]
    assert not torch.equal(newest.lm_head.weight, earlier.lm_head.weight)
    with pytest.raises(UsageError, match=r"no checkpoint of step 11 \(there are: 10, 20\)"):
        load_run(run, step=11)


def test_generate_is_seeded_and_the_same_from_an_export(run, tmp_path, capsys):
    main(["export", str(run), "--out", str(tmp_path / "out")])
    capsys.readouterr()
    texts = []
    for model, seed in ((run, "1"), (run, "1"), (tmp_path / "out", "1"), (run, "2")):
        assert main(["generate", str(model), "--prompt", "the", "--max-new-tokens", "12", "--seed", seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] == texts[2] != texts[3] and texts[0].startswith("the")


def test_greedy_generation_equals_a_loop_over_argmax(run, capsys):
    main(["generate", str(run), "--prompt", "seven wizards", "--max-new-tokens", "8", "--temperature", "0"])
    model, tokenizer = load_run(run)
    ids = [tokenizer.eos_token_id, *tokenizer("seven wizards").input_ids]  # what a document starts with
    for _ in range(8):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    assert capsys.readouterr().out.split("\n---")[0] == tokenizer.decode(ids, skip_special_tokens=True)


def test_plot_writes_pictures(run, capsys):
    assert main(["plot", str(run)]) == 0
    written = capsys.readouterr().out.split()
    assert written and all(path.endswith(".png") for path in written)


def test_lora_run_exports_as_adapter_and_merged_with_the_same_logits(run, tmp_path):
    main(["export", str(run), "--out", str(tmp_path / "base")])
    adapter = {"kind": "lora", "rank": 4}
    config = run_config(tmp_path, "optim.lr=0.02", "name=lora", model={"path": str(tmp_path / "base")}, adapter=adapter)
    build_trainer(config).fit()
    trained, _ = load_run(tmp_path / "runs" / "lora")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    main(["export", str(tmp_path / "runs" / "lora"), "--out", str(tmp_path / "merged"), "--merge"])
    main(["export", str(tmp_path / "runs" / "lora"), "--out", str(tmp_path / "adapter")])
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    from peft import PeftModel

    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    with torch.no_grad():
        expected = trained(**INPUT).logits
        assert not torch.allclose(expected, base(**INPUT).logits, atol=1e-3)
        assert torch.allclose(merged(**INPUT).logits, expected, atol=1e-5)
        assert torch.allclose(loaded(**INPUT).logits, expected, atol=1e-5)
