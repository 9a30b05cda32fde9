"""Token stores and packed rows give back what was written, and notice damage."""

import json
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data.documents import PackedRows, TokenStore, manifest_bytes, read_manifest
from scale.data.store import StoreWriter, choose_dtype
from scale.errors import UsageError

FACTS = {"vocab_size": None, "eos_id": None, "tokenizer": None, "source": {}, "held_out": 0.0, "dropped": {}}
DOCUMENT = st.tuples(
    st.sampled_from(["train", "valid"]),
    st.lists(st.integers(0, 70_000), min_size=1, max_size=12),
    st.one_of(st.none(), st.integers(0, 2**12 - 1)),
)


def write(folder, documents, dtype="uint32", shard_tokens=10):
    writer = StoreWriter(folder, dtype, shard_tokens)
    for split, ids, learned in documents:
        writer.add(split, np.array(ids), learned, "here")
    return writer.finish(**FACTS)


@settings(max_examples=40, deadline=None)
@given(st.lists(DOCUMENT, max_size=12))
def test_documents_come_back_across_shards(tmp_path_factory, drawn):
    folder = tmp_path_factory.mktemp("store")
    documents = [
        (split, ids, None if bits is None else np.array([bits >> i & 1 for i in range(len(ids))], dtype=bool))
        for split, ids, bits in drawn
    ]
    write(folder, documents)
    for split in ("train", "valid"):
        want = [(ids, learned) for s, ids, learned in documents if s == split]
        store = pickle.loads(pickle.dumps(TokenStore(folder, split)))
        assert store.lengths.dtype == np.int64
        assert store.lengths.tolist() == [len(ids) for ids, _ in want]
        assert store.tokens == sum(len(ids) for ids, _ in want)
        assert store.max_id == max((i for ids, _ in want for i in ids), default=-1)
        for doc, (ids, learned) in enumerate(want):
            start = len(ids) // 3
            assert store.ids(doc, start, len(ids)).tolist() == ids[start:]
            got = store.learned(doc, start, len(ids))
            flags = np.ones(len(ids), dtype=bool) if learned is None else learned
            assert (np.ones(len(ids) - start, dtype=bool) if got is None else got).tolist() == flags[start:].tolist()


def test_a_full_shard_is_followed_by_the_next(tmp_path):
    manifest = write(tmp_path, [("train", [1] * 6, None)] * 5, shard_tokens=10)
    assert [(s.tokens, s.documents) for s in manifest.train] == [(12, 2), (12, 2), (6, 1)]
    assert sorted(p.name for p in tmp_path.glob("*.tokens.npy")) == [f"train-0000{i}.tokens.npy" for i in range(3)]


def test_slices_beyond_a_document_are_refused(tmp_path):
    write(tmp_path, [("train", [1, 2, 3], None), ("train", [4, 5], None)])
    store = TokenStore(tmp_path, "train")
    for doc, start, stop in [(0, 0, 4), (2, 0, 1), (-1, 0, 1), (0, -1, 2), (0, 2, 1)]:
        with pytest.raises(IndexError):
            store.ids(doc, start, stop)


def test_damage_is_one_line(tmp_path):
    with pytest.raises(UsageError, match=r"not a token store \(no manifest\.json\)"):
        TokenStore(tmp_path, "train")
    write(tmp_path, [("train", [1, 2, 3], None)])
    file = tmp_path / "train-00000.tokens.npy"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    with pytest.raises(UsageError, match=r"train-00000\.tokens\.npy: 139 bytes instead of 140 \(cut off\?\)"):
        TokenStore(tmp_path, "train")
    file.unlink()
    with pytest.raises(UsageError, match=r"train-00000\.tokens\.npy: missing from its token store"):
        TokenStore(tmp_path, "valid")
    file.write_bytes(good)
    manifest = tmp_path / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    for change, message in [
        ({"version": 9}, "format version 9, but this program reads 3"),
        ({"max_id": "x"}, "max_id: .*damaged"),
        (
            {"train": [content["train"][0] | {"ids": content["train"][0]["ids"] | {"name": "../x"}}]},
            "leaves the folder",
        ),
    ]:
        manifest.write_bytes(manifest_bytes(content | change))
        with pytest.raises(UsageError, match=message):
            TokenStore(tmp_path, "train")
    manifest.write_text("{")
    with pytest.raises(UsageError, match="not readable as JSON"):
        TokenStore(tmp_path, "train")


def test_any_changed_byte_of_a_manifest_shows(tmp_path):
    write(tmp_path, [("train", [1, 2, 3], None), ("valid", [4, 5], None)])
    manifest = tmp_path / "manifest.json"
    good = manifest.read_bytes()
    for i in range(len(good)):
        manifest.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(UsageError, match=r"manifest\.json: "):
            read_manifest(tmp_path)


def test_dtype_is_the_narrowest_that_fits(tmp_path):
    assert choose_dtype("auto", 65_536) == "uint16"
    assert choose_dtype("auto", 65_537) == choose_dtype("auto", None) == "uint32"
    assert choose_dtype("uint32", 300) == "uint32"
    with pytest.raises(UsageError, match="uint16: holds ids up to 65535, but the tokenizer has 65537 entries"):
        choose_dtype("uint16", 65_537)
    with pytest.raises(UsageError, match="here: token id 65536 does not fit uint16"):
        write(tmp_path, [("train", [65_536], None)], dtype="uint16")


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64])
def test_packed_rows_are_divided_by_content(tmp_path, dtype):
    array = np.random.default_rng(0).integers(0, 1000, (200, 16)).astype(dtype)
    array[7] = array[3]
    np.save(tmp_path / "a.npy", array)
    train, valid = (pickle.loads(pickle.dumps(side)) for side in PackedRows.open(tmp_path / "a.npy", 0.1))
    rows = {s: [tuple(d.ids(i, 0, 16)) for i in range(len(d.lengths))] for s, d in [("t", train), ("v", valid)]}
    assert sorted(rows["t"] + rows["v"]) == sorted(map(tuple, array.tolist()))
    assert not set(rows["t"]) & set(rows["v"]) and 5 <= len(rows["v"]) <= 40
    assert train.max_id == max(map(max, rows["t"])) and train.tokens == 16 * len(rows["t"])
    assert train.ids(0, 3, 5).tolist() == list(rows["t"][0][3:5]) and train.learned(0, 3, 5) is None
    np.save(tmp_path / "b.npy", array[::-1])
    again, _ = PackedRows.open(tmp_path / "b.npy", 0.1)
    assert sorted(tuple(again.ids(i, 0, 16)) for i in range(len(again.lengths))) == sorted(rows["t"])


def test_packed_rows_hold_out_at_least_one_and_keep_one(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(6, dtype=np.int64).reshape(3, 2))
    assert [len(d.lengths) for d in PackedRows.open(tmp_path / "a.npy", 0.0)] == [3, 0]
    assert [len(d.lengths) for d in PackedRows.open(tmp_path / "a.npy", 1e-12)] == [2, 1]
    assert [len(d.lengths) for d in PackedRows.open(tmp_path / "a.npy", 1 - 1e-12)] == [1, 2]
    np.save(tmp_path / "one.npy", np.ones((3, 2), dtype=np.int64))
    with pytest.raises(UsageError, match="only one distinct document"):
        PackedRows.open(tmp_path / "one.npy", 0.5)


BAD_ARRAYS = [
    (np.zeros(3, dtype=np.int64), r"int64 array of shape \(3,\): expected rows x seq_len"),
    (np.zeros((3, 2), dtype=np.float32), "expected uint16, uint32 or int64 token ids"),
    (np.array([[1, 2], [3, -4]]), "row 1: token id -4 is negative"),
]


@pytest.mark.parametrize(("array", "message"), BAD_ARRAYS)
def test_bad_arrays_are_named(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UsageError, match=rf"a\.npy: .*{message}"):
        PackedRows.open(tmp_path / "a.npy", 0.0)


def test_packed_files_are_never_unpickled_nor_half_read(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[{}]], dtype=object), allow_pickle=True)
    with pytest.raises(UsageError, match=r"a\.npy: not a complete \.npy array"):
        PackedRows.open(tmp_path / "a.npy", 0.0)
    np.save(tmp_path / "b.npy", np.zeros((100, 100), dtype=np.int64))
    (tmp_path / "b.npy").write_bytes((tmp_path / "b.npy").read_bytes()[:-1])
    with pytest.raises(UsageError, match=r"b\.npy: not a complete \.npy array"):
        PackedRows.open(tmp_path / "b.npy", 0.0)
    with pytest.raises(UsageError, match=r"c\.npy: no such file"):
        PackedRows.open(tmp_path / "c.npy", 0.0)
