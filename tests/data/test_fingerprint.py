"""A checkpoint counts documents, so it must meet the same ones again: where they lie may change, what they say may not."""

import json
import pickle

import numpy as np
import pytest
import yaml

from scale.api import UsageError, build_trainer, load_config
from scale.config.data import DataConfig
from scale.data.documents import PackedRows, TokenStore
from scale.data.prepare import prepare
from tests.conftest import metrics_of, tiny_run


def made(folder, *overrides):
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(tiny_run(folder)))
    return build_trainer(load_config(path, ["train.steps=12", "checkpoint.every=4", *overrides]))


def stopped_at(trainer, step):
    """Train up to a checkpoint, as a stop signal would have it."""
    trainer.loop.settings = type(trainer.loop.settings)(steps=step, eval_every=500, save_every=4)
    trainer.fit()


def other_words(corpus):
    corpus.write_text(corpus.read_text().replace("wizards", "dragons"))  # as many documents of about the same lengths


def test_a_run_continues_on_the_same_data_wherever_they_lie(tmp_path):
    made(tmp_path, "name=whole", "eval.every=500").fit()
    stopped_at(made(tmp_path, "eval.every=500"), 4)
    moved = made(tmp_path, "eval.every=500", f"data.cache={tmp_path / 'elsewhere'}")
    assert moved.fit() == "completed"
    losses = [[row["loss"] for row in metrics_of(tmp_path / "runs" / n)] for n in ("whole", "tiny")]
    assert losses[0] == losses[1]


def status(folder):
    return json.loads((folder / "runs" / "tiny" / "run_state.json").read_text())["status"]


def test_a_run_does_not_continue_on_other_data(tmp_path):
    stopped_at(made(tmp_path), 4)
    before, was = metrics_of(tmp_path / "runs" / "tiny"), status(tmp_path)
    corpus = tmp_path / "corpus.jsonl"
    original = corpus.read_text()
    other_words(corpus)
    with pytest.raises(UsageError, match=r"^data\.sources: the data or the tokenizer changed .* another name$"):
        made(tmp_path).fit()
    assert status(tmp_path) == was != "failed"  # the run is what it was
    assert metrics_of(tmp_path / "runs" / "tiny") == before
    checkpoints = (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()
    assert [p.name for p in checkpoints if p.name.startswith("step_")] == ["step_00000004"]
    corpus.write_text(original)
    assert made(tmp_path).fit() == "completed"


def sources(folder, *names, tokenizer=300):
    for name in names:
        if not (folder / name).exists():
            texts = [f"{name} {i} one two three" for i in range(40)]
            (folder / name).write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return prepare(
        DataConfig(
            sources=[{"kind": "jsonl", "path": str(folder / name), "name": name} for name in names],
            tokenizer={"vocab_size": tokenizer} if isinstance(tokenizer, int) else {"path": tokenizer},
            held_out={"fraction": 0.2},
            cache=str(folder / "cache"),
        ),
        progress=False,
    )


def test_content_order_and_tokenizer_each_show(tmp_path):
    both = sources(tmp_path, "a", "b")
    both.tokenizer.save_pretrained(str(tmp_path / "tok"))
    tok = str(tmp_path / "tok")
    assert sources(tmp_path, "a", "b", tokenizer=tok).fingerprint() == both.fingerprint()
    others = [sources(tmp_path, *names, tokenizer=tok).fingerprint() for names in ("ba", "a", "b")]
    others.append(sources(tmp_path, "a", "b", tokenizer=290).fingerprint())
    (tmp_path / "a").write_text((tmp_path / "a").read_text().replace("a 39 one", "a 39 two"))
    others.append(sources(tmp_path, "a", "b", tokenizer=tok).fingerprint())
    assert len({both.fingerprint(), *others}) == 6


def test_each_side_of_a_store_has_its_own_and_keeps_it_through_pickling(tmp_path):
    got = sources(tmp_path, "a")
    store, valid = got.train[0], got.valid[0]
    assert store.fingerprint != valid.fingerprint
    assert pickle.loads(pickle.dumps(store)).fingerprint == store.fingerprint
    assert TokenStore(store.folder, "train").fingerprint == store.fingerprint


def test_packed_rows_are_known_by_content_whatever_their_type(tmp_path):
    rows = np.random.default_rng(0).integers(0, 1000, (50, 8))
    np.save(tmp_path / "a.npy", rows)
    train, valid = PackedRows.open(tmp_path / "a.npy", 0.2)
    assert train.fingerprint != valid.fingerprint
    assert pickle.loads(pickle.dumps(train)).fingerprint == train.fingerprint
    np.save(tmp_path / "b.npy", rows.astype(np.uint16))
    assert PackedRows.open(tmp_path / "b.npy", 0.2)[0].fingerprint == train.fingerprint
    for name, changed in (("order", rows[::-1]), ("shape", rows.reshape(25, 16)), ("id", rows + (rows == rows[3, 3]))):
        np.save(tmp_path / f"{name}.npy", changed)
        assert PackedRows.open(tmp_path / f"{name}.npy", 0.2)[0].fingerprint != train.fingerprint
