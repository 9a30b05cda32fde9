"""The Python face: any torch module, source and objective; the config face: a whole run."""

import json

import pytest
import torch
import yaml

from scale.api import (
    CheckpointConfig,
    OptimConfig,
    ScaleError,
    Score,
    Trainer,
    UsageError,
    build_trainer,
    load_config,
    load_run,
)
from scale.checkpoint.saved import latest_good
from tests.conftest import metrics_of, tiny_run
from tests.train.parts import Numbers, Squares, network


def trainer(folder, steps=20, model=None, **options):
    options = {"optim": OptimConfig(lr=0.05), "checkpoint": CheckpointConfig(every=5), "seed": 3} | options
    return Trainer(model or network(), Numbers(), Squares(), folder=folder, steps=steps, **options)


def test_any_module_trains_and_the_folder_tells_the_story(tmp_path):
    made = trainer(tmp_path / "run")
    assert made.fit() == "completed"
    rows = metrics_of(tmp_path / "run")
    assert len(rows) == 20 and rows[-1]["loss"] < rows[0]["loss"] / 2
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert (state["status"], state["step"], state["total_backward"]) == ("completed", 20, 20)
    assert state["latest_checkpoint"] == "step_00000020"


def test_a_shorter_and_a_resumed_run_equal_an_uninterrupted_one(tmp_path):
    trainer(tmp_path / "whole", model=network(dropout=0.3)).fit()
    first = trainer(tmp_path / "parts", model=network(dropout=0.3))
    first.loop.settings = type(first.loop.settings)(steps=20, eval_every=500, save_every=5)
    first.recorder.step, original = (lambda r, s: (original(r, s), stop_at(first, r, 12))), first.recorder.step
    assert first.fit() == "stopped"
    torch.rand(7)  # whatever happens between the two processes
    assert trainer(tmp_path / "parts", model=network(5, dropout=0.3)).fit() == "completed"
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "whole")


def stop_at(made, report, step):
    if report.step == step:
        import os
        import signal

        os.kill(os.getpid(), signal.SIGUSR1)


def test_a_finished_run_is_not_trained_again(tmp_path):
    trainer(tmp_path / "run").fit()
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    assert trainer(tmp_path / "run").fit() == "completed"
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_named_and_the_one_before_continues(tmp_path, capsys):
    trainer(tmp_path / "run").fit()
    newest = tmp_path / "run" / "checkpoints" / "step_00000020" / "state.json"
    newest.write_bytes(newest.read_bytes().replace(b"drawn", b"drown"))
    expected = metrics_of(tmp_path / "run")
    trainer(tmp_path / "run").fit()
    assert "step_00000020" in (said := capsys.readouterr().out) and "step_00000015" in said
    assert metrics_of(tmp_path / "run") == expected


def test_a_failing_monitor_does_not_stop_the_run(tmp_path, capsys):
    class Breaks:
        name = "breaks"

        def start(self, facts):
            pass

        def log(self, row):
            raise ValueError("no space in the cloud")

        def finish(self, status):
            pass

    assert trainer(tmp_path / "run", monitors=[Breaks()]).fit() == "completed"
    assert capsys.readouterr().out.count("no space in the cloud") == 1


def test_an_error_is_written_into_the_run_state(tmp_path):
    class Bad(Squares):
        def counts(self, batch):
            return {"mse": torch.tensor(0)}

    made = Trainer(network(), Numbers(), Bad(), folder=tmp_path / "run", steps=50)
    with pytest.raises(ScaleError):
        made.fit()
    state = json.loads((tmp_path / "run" / "run_state.json").read_text())
    assert state["status"] == "failed" and "nothing to learn" in state["error_message"]


def test_a_judge_is_made_from_the_wrapped_module(tmp_path):
    class Counts:
        def __init__(self, root):
            self.root = root

        def score(self):
            return Score(loss=float(self.root.model[0].weight.detach().norm()), tokens=1)

    trainer(tmp_path / "run", judge=Counts, eval_every=10).fit()
    assert [r["step"] for r in metrics_of(tmp_path / "run") if r["val_loss"] is not None] == [0, 10, 20]


def run_config(tmp_path, *overrides, **changes):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(tmp_path, **changes)))
    return load_config(path, overrides)


def test_a_config_trains_a_language_model_whose_held_out_loss_falls(tmp_path):
    assert build_trainer(run_config(tmp_path, "train.steps=30", "optim.lr=0.01")).fit() == "completed"
    rows = metrics_of(tmp_path / "runs" / "tiny")
    scores = [r["val_loss"] for r in rows if r["val_loss"] is not None]
    assert scores[-1] < 0.8 * scores[0]
    assert rows[-1]["sources"] == {"jsonl": 1.0}
    model, tokenizer = load_run(tmp_path / "runs" / "tiny")
    assert tokenizer.decode(tokenizer("quick brown").input_ids) == "quick brown"
    assert not model.training


@pytest.mark.parametrize("micro", [1, 2, 4])
def test_accumulation_does_not_change_the_losses(tmp_path, micro):
    """1x8 = 8x1: twenty steps of a real model on packed documents, fp32."""
    build_trainer(run_config(tmp_path, "name=one", "batch.micro=8")).fit()
    build_trainer(run_config(tmp_path, "name=many", f"batch.micro={micro}")).fit()
    one, many = (metrics_of(tmp_path / "runs" / name) for name in ("one", "many"))
    assert len(one) == 21
    for a, b in zip(one[1:], many[1:], strict=True):
        assert b["forward_passes"] == a["forward_passes"] * 8 / micro
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_recomputing_activations_changes_no_loss(tmp_path):
    for every in ("off", "1", "2"):
        build_trainer(run_config(tmp_path, f"name=r{every}", f"compute.recompute={every}", "train.steps=6")).fit()
    off, all_, some = (metrics_of(tmp_path / "runs" / f"r{every}") for every in ("off", "1", "2"))
    assert off == all_ == some


def test_a_changed_config_is_refused_by_name_unless_allowed(tmp_path):
    build_trainer(run_config(tmp_path, "train.steps=5")).fit()
    with pytest.raises(UsageError, match=r"optim\.lr: 0\.003 -> 0\.001.*--allow-change optim\.lr"):
        build_trainer(run_config(tmp_path, "train.steps=5", "optim.lr=0.001"))
    build_trainer(run_config(tmp_path, "train.steps=5", "checkpoint.every=7"))
    build_trainer(run_config(tmp_path, "train.steps=7", "optim.lr=0.001"), allow=["optim.lr", "train.steps"]).fit()
    assert latest_good(tmp_path / "runs" / "tiny" / "checkpoints", print).step == 7


def test_lengths_in_tokens_and_epochs(tmp_path):
    by_tokens = build_trainer(run_config(tmp_path, train={"tokens": 5000}))
    fill = by_tokens.source.planner.fill()
    assert 0.8 < fill <= 1 and by_tokens.loop.settings.steps == -(-5000 // (512 * fill))
    by_epochs = build_trainer(run_config(tmp_path, train={"epochs": 2}))
    documents = by_epochs.source.blocks.reader.documents[0]
    positions = documents.tokens - len(documents.lengths)  # the first token of a document is never predicted
    assert by_epochs.loop.settings.steps == -(-2 * positions // (512 * fill))


def test_attention_reaches_across_documents_only_when_asked(tmp_path):
    build_trainer(run_config(tmp_path, "train.steps=3", "name=apart")).fit()
    build_trainer(run_config(tmp_path, "train.steps=3", "name=across", "data.cross_documents=true")).fit()
    build_trainer(run_config(tmp_path, "train.steps=3", "name=stream", "data.packing=concat")).fit()
    losses = [[r["loss"] for r in metrics_of(tmp_path / "runs" / n)] for n in ("apart", "across", "stream")]
    assert losses[0] != losses[1] != losses[2] != losses[0]


def test_out_of_memory_in_a_real_run_keeps_every_loss(tmp_path, monkeypatch):
    from scale.objectives.causal_lm import CausalLM

    build_trainer(run_config(tmp_path, "name=plain", "train.steps=5")).fit()
    roomy = CausalLM.__call__

    def tight(self, model, batch):
        loss = roomy(self, model, batch)
        if model.training and len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return loss

    monkeypatch.setattr(CausalLM, "__call__", tight)
    build_trainer(run_config(tmp_path, "name=tight", "train.steps=5")).fit()
    plain, small = (metrics_of(tmp_path / "runs" / n)[1:] for n in ("plain", "tight"))
    assert [r["loss"] for r in small] == pytest.approx([r["loss"] for r in plain], rel=1e-5)
    events = json.loads((tmp_path / "runs" / "tight" / "run_state.json").read_text())["events"]
    assert [e["kind"] for e in events].count("out_of_memory") == 2


def test_profile_writes_a_trace(tmp_path):
    build_trainer(run_config(tmp_path, "train.steps=4", profile={"steps": "2-3"})).fit()
    assert (tmp_path / "runs" / "tiny" / "profile" / "trace_2-3.json").stat().st_size > 1000


@pytest.mark.slow
def test_compiled_training_equals_eager(tmp_path):
    for mode in ("off", "default"):
        build_trainer(run_config(tmp_path, f"name=c{mode}", f"compute.compile={mode}", "train.steps=6")).fit()
    off, compiled = (metrics_of(tmp_path / "runs" / f"c{mode}") for mode in ("off", "default"))
    assert [r["loss"] for r in compiled[1:]] == pytest.approx([r["loss"] for r in off[1:]], rel=1e-4)


def test_attention_implementations_agree_on_packed_documents(tmp_path):
    for name in ("sdpa", "eager"):
        build_trainer(run_config(tmp_path, f"name={name}", f"compute.attention={name}", "train.steps=4")).fit()
    a, b = ([r["loss"] for r in metrics_of(tmp_path / "runs" / n)[1:]] for n in ("sdpa", "eager"))
    assert a == pytest.approx(b, rel=1e-5)


@pytest.mark.parametrize(("overrides", "message"), [
    (["schedule.warmup=50"], r"schedule\.warmup = 50: longer than the run of 20 steps"),
    (["profile={steps: 19-21}"], r"profile\.steps = '19-21': the run has only 20 steps"),
])  # fmt: skip
def test_what_a_run_of_this_length_cannot_honour_is_refused(tmp_path, overrides, message):
    with pytest.raises(UsageError, match=message):
        build_trainer(run_config(tmp_path, *overrides))


def test_allowing_a_key_that_does_not_exist_is_an_error(tmp_path):
    build_trainer(run_config(tmp_path, "train.steps=2")).fit()
    with pytest.raises(UsageError, match=r"--allow-change optimm\.lr: the config has no such key"):
        build_trainer(run_config(tmp_path, "train.steps=2"), allow=["optimm.lr"])


def test_a_resumed_run_must_make_the_same_automatic_choices(tmp_path):
    build_trainer(run_config(tmp_path, "train.steps=2")).fit()
    again = build_trainer(run_config(tmp_path, "train.steps=2"))
    again.settled["compute.precision"] = "bf16"
    with pytest.raises(
        UsageError, match=r"compute\.precision = 'auto': was fp32 .* would be bf16 here: add compute\.pre"
    ):
        again.fit()
    asked = build_trainer(run_config(tmp_path, "train.steps=2", "compute.precision=fp32"), allow=["compute.precision"])
    assert "compute.precision" not in asked.settled and asked.fit() == "completed"


def test_utilisation_and_flops_follow_the_row_length(tmp_path):
    curriculum = [{"until": 0.5, "seq_len": 16}]
    made = build_trainer(run_config(tmp_path, data=tiny_run(tmp_path)["data"] | {"curriculum": curriculum}))
    short, long = (made.recorder.flops_per_token(n) for n in (16, 64))
    assert long - short == 12 * 2 * 2 * 16 * (64 - 16)
    tokens = made.recorder.facts["tokens (without padding)"]
    assert made.recorder.facts["FLOPs"] == pytest.approx(tokens * (short + long) / 2, rel=1e-3)
