"""Raw data to documents: complete, divided for good, written once, and never half."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scale.config.data import DataConfig
from scale.data import ingest, tokenizer
from scale.data.planner import Planner
from scale.data.prepare import prepare, tokenize
from scale.data.rows import RowReader
from scale.errors import ScaleError, UsageError
from scale.sealed import SEAL

WORDS = ["alpha", "beta", "gamma", "delta", "naïve", "über", "(x)", "{y}", "\n", "42"]


def made_up(n, seed=0):
    rng = np.random.default_rng(seed)
    return [f"{i} " + " ".join(rng.choice(WORDS, 12)) for i in range(n)]


def jsonl(path: Path, rows):
    path.write_text("".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in rows))
    return str(path)


def config(tmp_path, *sources, vocab_size=300, fraction=0.1, **more):
    tok = {} if vocab_size is None else {"tokenizer": {"vocab_size": vocab_size}}
    return DataConfig(
        sources=list(sources), held_out={"fraction": fraction}, **{"cache": str(tmp_path / "cache"), **tok, **more}
    )


def decoded(documents, tok):
    every = [documents.ids(i, 0, n) for i, n in enumerate(documents.lengths)]
    assert all((ids[0], ids[-1]) == (tok.bos_token_id, tok.eos_token_id) for ids in every)
    return [tok.decode(ids[1:-1]) for ids in every]


def leftovers(folder):
    return [p.name for p in Path(folder).rglob("*") if p.name.endswith(".tmp")]


def test_every_distinct_document_is_on_exactly_one_side(tmp_path):
    texts = made_up(300)
    path = jsonl(tmp_path / "a.jsonl", texts + texts[:40] + ["", "  \n"])
    got = prepare(config(tmp_path, {"kind": "jsonl", "path": path, "weight": 2.0}), progress=False)
    assert (got.names, got.weights) == (["jsonl"], [2.0])
    train, valid = decoded(got.train[0], got.tokenizer), decoded(got.valid[0], got.tokenizer)
    assert sorted(train + valid) == sorted(texts)
    assert not set(train) & set(valid) and 10 <= len(valid) <= 60
    assert got.train[0].manifest.dropped == {"exact duplicates": 40, "empty": 2, "nothing to learn": 0}
    assert got.train[0].manifest.dtype == "uint16" and got.train[0].max_id < 300


def test_the_start_token_is_an_input_and_the_end_token_a_target_of_every_document(tmp_path):
    source = {"kind": "jsonl", "path": jsonl(tmp_path / "a.jsonl", made_up(60))}
    got = prepare(config(tmp_path, source, seq_len=128), progress=False)
    (documents,) = got.train
    assert documents.lengths.max() <= 129  # none is cut: each begins and ends within one row
    planner = Planner([documents.lengths], [1.0], 512, lambda _: 128, 128)
    reader, seen = RowReader([documents]), set()
    while len(seen) < len(documents.lengths):
        plan = planner.next()
        batch = reader.batch(plan.rows, plan.seq_len)
        for b, row in enumerate(plan.rows):
            begins = (batch["position_ids"][b] == 0).nonzero().flatten().tolist()
            for span, at in zip(row, begins, strict=False):
                assert batch["input_ids"][b, at] == got.tokenizer.bos_token_id
                assert batch["targets"][b, at + span.length - 1] == got.tokenizer.eos_token_id
                words = batch["targets"][b, at : at + span.length - 1]
                assert got.tokenizer.decode(words) in made_up(60)  # the first word too is learned
                seen.add(span.doc)


def test_text_that_the_tokenizer_does_not_know_is_nothing_to_learn(tmp_path):
    knows_a = Tokenizer(models.BPE({"<e>": 0, "a": 1, "b": 2}, []))
    knows_a.pre_tokenizer = pre_tokenizers.Whitespace()
    tok = PreTrainedTokenizerFast(tokenizer_object=knows_a, eos_token="<e>")
    raw = config(tmp_path, {"kind": "jsonl", "path": jsonl(tmp_path / "a.jsonl", ["a b", "zzz"])}, vocab_size=300)
    manifest = tokenize(raw.sources[0], tmp_path / "out", tok, progress=False)
    assert manifest.dropped["nothing to learn"] == 1 and manifest.train[0].tokens == 4


def test_more_documents_move_none(tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "_BATCH_DOCUMENTS", 7)
    texts = made_up(200)
    sides = []
    for n in (120, 200):
        path = jsonl(tmp_path / f"{n}.jsonl", texts[:n][::-1])
        got = prepare(config(tmp_path, {"kind": "jsonl", "path": path}), progress=False)
        sides.append((set(decoded(got.train[0], got.tokenizer)), set(decoded(got.valid[0], got.tokenizer))))
    assert sides[0][0] < sides[1][0] and sides[0][1] <= sides[1][1]


def test_a_text_lies_on_the_same_side_in_every_raw_source(tmp_path):
    texts = made_up(150)
    a, b = (jsonl(tmp_path / f"{name}.jsonl", part) for name, part in (("a", texts[:100]), ("b", texts[50:])))
    source = [{"kind": "jsonl", "path": path, "name": path[-7]} for path in (a, b)]
    got = prepare(config(tmp_path, *source, fraction=0.3), progress=False)
    train, valid = ([set(decoded(d, got.tokenizer)) for d in side] for side in (got.train, got.valid))
    assert not (train[0] | train[1]) & (valid[0] | valid[1])
    assert train[0] & train[1] and valid[0] & valid[1]  # but neither drops what the other holds


@pytest.mark.parametrize(("fraction", "valid"), [(0.0, 0), (1e-12, 1), (1 - 1e-12, 4)])
def test_both_sides_get_a_document(tmp_path, fraction, valid):
    path = jsonl(tmp_path / "a.jsonl", made_up(5))
    got = prepare(config(tmp_path, {"kind": "jsonl", "path": path}, fraction=fraction, vocab_size=258), progress=False)
    assert len(got.valid[0].lengths) == valid and len(got.train[0].lengths) == 5 - valid
    every = decoded(got.train[0], got.tokenizer) + decoded(got.valid[0], got.tokenizer)
    assert sorted(every) == sorted(made_up(5))


def test_the_lowest_hash_is_held_out_whatever_the_order(tmp_path):
    texts = made_up(20)
    lowest = min(texts, key=lambda t: int.from_bytes(hashlib.blake2b(t.encode(), digest_size=8).digest(), "little"))
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", sorted(texts, key=lambda t: t != lowest))):
        source = {"kind": "jsonl", "path": jsonl(tmp_path / f"{name}.jsonl", order)}
        got = prepare(config(tmp_path, source, fraction=1e-12), progress=False)
        assert decoded(got.valid[0], got.tokenizer) == [lowest]


def test_a_single_document_cannot_be_divided(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", made_up(1) * 3)
    with pytest.raises(UsageError, match=r"held_out\.fraction = 0\.1, but there is only one distinct document"):
        prepare(config(tmp_path, {"kind": "jsonl", "path": path}), progress=False)
    assert not leftovers(tmp_path)


def test_cache_is_reused_and_renewed(tmp_path, monkeypatch):
    path = jsonl(tmp_path / "a.jsonl", made_up(50))
    source = {"kind": "jsonl", "path": path}
    first = prepare(config(tmp_path, source), progress=False)
    content = {p: p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file()}
    with monkeypatch.context() as patched:
        patched.setattr(ingest, "documents", lambda _: pytest.fail("read the raw source again"))
        patched.setattr(tokenizer, "train", lambda *_: pytest.fail("trained the tokenizer again"))
        again = prepare(config(tmp_path, {**source, "name": "other", "weight": 3.0}), progress=False)
    assert again.train[0].folder == first.train[0].folder
    other = prepare(config(tmp_path, source, fraction=0.3), progress=False)
    assert other.train[0].folder != first.train[0].folder
    first.tokenizer.save_pretrained(str(tmp_path / "tok"))
    same = {"tokenizer": {"path": str(tmp_path / "tok")}}
    parts = [prepare(config(tmp_path, source, fraction=f, **same), progress=False).valid[0] for f in (0.1, 0.5)]
    assert parts[0].folder == first.train[0].folder and len(parts[0].lengths) < len(parts[1].lengths)
    jsonl(tmp_path / "a.jsonl", made_up(51))
    grown = prepare(config(tmp_path, source), progress=False)
    assert len(grown.train[0].lengths) + len(grown.valid[0].lengths) == 51
    assert {p: p.read_bytes() for p in content} == content


def test_two_runs_write_the_same_bytes(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", made_up(80))
    stores = []
    for name in ("one", "two"):
        got = prepare(config(tmp_path, {"kind": "jsonl", "path": path}, cache=str(tmp_path / name)), progress=False)
        files = [p for p in got.train[0].folder.rglob("*") if p.is_file() and p.name != SEAL]  # the seal holds times
        stores.append({p.name: p.read_bytes() for p in files})
    assert stores[0] == stores[1] and len(stores[0]) >= 6


def test_masks_survive_and_unlearnable_documents_do_not(tmp_path):
    rows = [
        {"input_ids": [1, 2, 3], "labels": [-100, 2, 3]},
        {"input_ids": [4, 5], "labels": [-100, -100]},
        {"input_ids": [6, 7], "labels": [6, -100]},  # a first token has no context
        {"input_ids": [8], "labels": [8]},
        {"input_ids": [9, 10, 11], "labels": [-100, -100, 11]},
    ]
    columns = {"input_ids": "input_ids", "labels": "labels"}
    source = {"kind": "jsonl", "path": jsonl(tmp_path / "a.jsonl", rows), "columns": columns}
    got = prepare(config(tmp_path, source, vocab_size=None, fraction=0), progress=False)
    assert got.tokenizer is None and got.train[0].manifest.dropped["nothing to learn"] == 3
    assert [got.train[0].ids(i, 0, 3).tolist() for i in (0, 1)] == [[1, 2, 3], [9, 10, 11]]
    assert [got.train[0].learned(i, 0, 3).tolist() for i in (0, 1)] == [[False, True, True], [False, False, True]]
    jsonl(tmp_path / "a.jsonl", rows[1:4])
    with pytest.raises(UsageError, match=r"no document has a token to learn from \(3 nothing to learn\)"):
        prepare(config(tmp_path, source, vocab_size=None, fraction=0), progress=False)


def test_ids_beyond_the_vocabulary(tmp_path):
    tok = tokenizer.train(made_up(30), 300)
    tok.save_pretrained(str(tmp_path / "tok"))
    path = jsonl(tmp_path / "a.jsonl", [{"ids": [1, 2]}, {"ids": [1, 300]}])
    ids = {"kind": "jsonl", "path": path, "columns": {"input_ids": "ids"}}
    np.save(tmp_path / "a.npy", np.array([[1, 2], [3, 300]]))
    packed = {"kind": "packed", "path": str(tmp_path / "a.npy")}
    for source, place in ((ids, r"a\.jsonl:2"), (packed, "data.sources: packed")):
        with pytest.raises(UsageError, match=place + ": token id 300, but the tokenizer has only 300 entries"):
            prepare(config(tmp_path, source, tokenizer={"path": str(tmp_path / "tok")}), progress=False)


def test_token_stores_bring_their_tokenizer_and_must_agree(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", made_up(30))
    raw = config(tmp_path, {"kind": "jsonl", "path": path}).sources[0]
    toks = {n: tokenizer.train(made_up(30), n) for n in (280, 300)}
    for n, tok in toks.items():
        tokenize(raw, tmp_path / f"s{n}", tok, held_out=0.1, progress=False)
    a, b = ({"kind": "tokens", "path": str(tmp_path / f"s{n}"), "name": f"n{n}"} for n in (280, 300))
    got = prepare(config(tmp_path, a, vocab_size=None), progress=False)
    assert tokenizer.content_hash(got.tokenizer) == tokenizer.content_hash(toks[280])
    assert sorted(decoded(got.train[0], toks[280]) + decoded(got.valid[0], toks[280])) == sorted(made_up(30))
    with pytest.raises(UsageError, match=r"source n280 .* has tokenizer \w+, source n300 .* has \w+; all sources must"):
        prepare(config(tmp_path, a, b, vocab_size=None), progress=False)
    with pytest.raises(UsageError, match=r"s280: exists already"):
        tokenize(raw, tmp_path / "s280", toks[280], progress=False)


def test_no_space_left_leaves_nothing(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        path = jsonl(tmp_path / "a.jsonl", [" ".join(made_up(20, seed)) for seed in range(200)])
        raw = config(tmp_path, {"kind": "jsonl", "path": path}).sources[0]
        with pytest.raises(ScaleError, match=r"small/out: the disk is full; .* nothing was kept$"):
            tokenize(raw, small / "out", tokenizer.train(made_up(5), 300), progress=False)
        assert list(small.iterdir()) == []
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        with pytest.raises(UsageError, match=r"small/out: cannot be written \(Read-only file system\)"):
            tokenize(raw, small / "out", tokenizer.train(made_up(5), 300), progress=False)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    path = jsonl(tmp_path / "a.jsonl", made_up(30))
    monkeypatch.setattr(ingest, "hash_of", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"cache/jsonl-\w+: nothing was kept"):
        prepare(config(tmp_path, {"kind": "jsonl", "path": path}), progress=False)
    assert not leftovers(tmp_path) and not list((tmp_path / "cache").glob("jsonl-*"))


SLOW = """
import sys, time
from scale.config.data import DataConfig
from scale.data import ingest, prepare
original = ingest.hash_of
def slow(content):
    time.sleep(0.01)
    return original(content)
ingest.hash_of = slow
prepare.prepare(DataConfig.model_validate_json(sys.argv[1]), progress=False)
"""


def test_killed_while_writing_then_two_runs_at_once(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", made_up(100))
    wanted = config(tmp_path, {"kind": "jsonl", "path": path})
    command = [sys.executable, "-c", SLOW, wanted.model_dump_json()]
    killed = subprocess.Popen(command)
    while not list((tmp_path / "cache").glob(".jsonl-*.tmp/train-*")):
        assert killed.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert leftovers(tmp_path) and not list((tmp_path / "cache").glob("jsonl-*"))
    pair = [subprocess.Popen(command) for _ in range(2)]
    assert [p.wait() for p in pair] == [0, 0]
    assert not leftovers(tmp_path) and len(list((tmp_path / "cache").glob("jsonl-*"))) == 1
    got = prepare(wanted, progress=False)
    assert sorted(decoded(got.train[0], got.tokenizer) + decoded(got.valid[0], got.tokenizer)) == sorted(made_up(100))
