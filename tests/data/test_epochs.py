"""What an epoch is over several sources."""

import json
import random
from collections import Counter

import numpy as np
import pytest

from scale.build import build_trainer, make_planner, mix
from scale.config import load_config
from scale.data.prepare import prepare
from scale.train.facts import total_steps
from tests.conftest import WORDS, metrics_of, tiny_run

SIZES = {"big": 400, "small": 25, "middle": 90}


@pytest.fixture
def make(tmp_path, make_config):
    def config(train, weights=(None, None, None), held_out=0, **changes):
        rng, sources = random.Random(0), []
        for (name, documents), weight in zip(SIZES.items(), weights, strict=True):
            path = tmp_path / f"{name}.jsonl"
            texts = (" ".join(rng.choices(WORDS, k=rng.randint(3, 60))) + f" {i}" for i in range(documents))
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
            sources.append({"kind": "jsonl", "path": str(path), "name": name} | ({"weight": weight} if weight else {}))
        data = tiny_run(tmp_path)["data"] | {"sources": sources, "held_out": {"fraction": held_out}}
        return load_config(make_config(data=data, train=train, **changes))

    return config


def seen_positions(config):
    """(source, document, position) -> how often the planned run trains on it."""
    prepared = prepare(config.data, progress=False)
    planner = make_planner(config, prepared, steps=1)
    seen = Counter()
    for _ in range(total_steps(config, sum(prepared.positions()), planner.fill())):
        for row in planner.next().rows:
            for span in row:
                seen.update((span.source, span.doc, at) for at in range(span.start, span.stop))
    return prepared, seen


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_without_weights_every_document_of_every_source_is_seen_once_an_epoch(make, epochs):
    prepared, seen = seen_positions(make({"epochs": epochs}))
    for i, documents in enumerate(prepared.train):
        times = np.array([seen[i, d, p] for d, n in enumerate(documents.lengths) for p in range(n - 1)])
        assert abs(times.mean() / epochs - 1) < 0.03  # the last step is a whole one, and rows are padded
        assert (times >= epochs).mean() > 0.97 and times.max() <= epochs + 1


def test_the_facts_and_the_metrics_say_how_often(make, tmp_path):
    config = make({"epochs": 2})
    trainer = build_trainer(config)
    passes = dict(part.split() for part in trainer.recorder.facts["passes"].split(", "))
    assert passes.keys() == SIZES.keys() and all(abs(float(n) / 2 - 1) < 0.05 for n in passes.values())
    assert "epochs" not in [event.kind for event in trainer.recorder.state.events]
    trainer.fit()
    last, sizes = metrics_of(tmp_path / "runs" / "tiny")[-1], prepare(config.data, progress=False).positions()
    done = {name: last["sources"][name] * last["tokens"] / size for name, size in zip(SIZES, sizes, strict=True)}
    assert all(abs(n / 2 - 1) < 0.05 for n in done.values())


def test_with_weights_the_tokens_are_shared_and_the_run_says_so(make, capsys):
    config = make({"epochs": 1}, weights=(2, 1, 1))
    prepared, seen = seen_positions(config)
    by_source = Counter()
    for (source, _, _), n in seen.items():
        by_source[source] += n
    assert np.allclose([by_source[i] / by_source.total() for i in range(3)], [0.5, 0.25, 0.25], atol=0.02)
    assert np.isclose(by_source.total(), sum(prepared.positions()), rtol=0.03)
    trainer = build_trainer(config)
    (event,) = [e.text for e in trainer.recorder.state.events if e.kind == "epochs"]
    assert "shared by weight" in event and event in capsys.readouterr().out
    told = dict(part.split() for part in trainer.recorder.facts["passes"].split(", "))
    sizes = prepared.positions()
    assert all(np.isclose(float(told[n]), by_source[i] / sizes[i], rtol=0.05) for i, n in enumerate(SIZES))


def test_runs_that_do_not_count_epochs_mix_as_ever(make):
    """A weight that is not given is 1, also beside one that is, and stands so in the resolved config."""
    for train, weights, want in (
        ({"steps": 3}, (None, None, None), [1, 1, 1]),
        ({"epochs": 1}, (None, 3, None), [1, 3, 1]),
    ):
        config = make(train, weights)
        assert [source.weight for source in config.data.sources] == want
        assert mix(config, prepare(config.data, progress=False)) == want


def test_held_out_tokens_are_shared_in_the_same_way(make):
    config = make({"epochs": 1}, held_out=0.3, eval={"tokens": 512})
    judge = build_trainer(config).loop.judge
    held = {name: sum(span.length for row in rows for span in row) for name, rows in judge.rows.items()}
    sizes = prepare(config.data, progress=False).positions()
    assert np.allclose([held[name] / 512 for name in SIZES], np.array(sizes) / sum(sizes), atol=0.02)
