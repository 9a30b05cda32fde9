"""Training, loading and hashing tokenizers; text survives the round trip whatever it holds."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scale.data import tokenizer as tokenizers
from scale.errors import UsageError

TEXTS = ["the quick brown fox jumps over the lazy dog " * 5, "a naïve café; def f(x): return x ** 2\n" * 5]


@pytest.fixture(scope="module")
def small():
    return tokenizers.train(TEXTS, 300)


@settings(max_examples=150, deadline=None)
@given(st.text())
def test_any_text_comes_back(small, text):
    (ids,) = tokenizers.Encoder(small)([text])
    if not text:
        assert ids == []
        return
    assert ids[0] == ids[-1] == small.bos_token_id == small.eos_token_id == 0
    assert small.decode(ids[1:-1]) == text


def test_a_text_starts_with_bos_where_there_is_one():
    tok = tokenizers.train(TEXTS, 300)
    plain = tokenizers.content_hash(tok)
    tok.bos_token = None
    assert tokenizers.content_hash(tok) == plain  # the same ids
    a = tok.convert_tokens_to_ids("a")
    assert tokenizers.Encoder(tok)(["a"]) == [[tok.eos_token_id, a, tok.eos_token_id]]
    tok.add_special_tokens({"bos_token": "<s>"})
    assert tok.bos_token_id == 300 and tokenizers.content_hash(tok) != plain
    assert tokenizers.Encoder(tok)(["a"]) == [[300, a, tok.eos_token_id]]


def test_special_tokens_in_text_stay_text(small):
    (ids,) = tokenizers.Encoder(small)(["a<|endoftext|>b"])
    assert ids.count(small.eos_token_id) == 2 and small.decode(ids[1:-1]) == "a<|endoftext|>b"


def test_training_is_deterministic_and_respects_the_size(small):
    assert len(small) == tokenizers.vocabulary_size(small) == 300
    assert tokenizers.content_hash(tokenizers.train(iter(TEXTS), 300)) == tokenizers.content_hash(small)
    assert tokenizers.content_hash(tokenizers.train(TEXTS[:1], 300)) != tokenizers.content_hash(small)


def test_saved_tokenizer_has_the_same_hash_and_ids(small, tmp_path):
    small.save_pretrained(str(tmp_path))
    for place in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = tokenizers.load(str(place))
        assert tokenizers.content_hash(loaded) == tokenizers.content_hash(small)
        assert tokenizers.Encoder(loaded)(TEXTS) == tokenizers.Encoder(small)(TEXTS)


def test_truncation_saved_in_a_tokenizer_cuts_nothing(small, tmp_path):
    small.backend_tokenizer.save(str(tmp_path / "t.json"))
    content = json.loads((tmp_path / "t.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "t.json").write_text(json.dumps(content))
    loaded = tokenizers.load(str(tmp_path / "t.json"))
    assert tokenizers.Encoder(loaded)(TEXTS) == tokenizers.Encoder(small)(TEXTS)
    assert tokenizers.content_hash(loaded) == tokenizers.content_hash(small)


def test_sample_is_even_and_bounded():
    pieces = [f"{i:04d}" for i in range(1000)]
    sample = tokenizers.sample_evenly(pieces, max_bytes=400)
    assert sum(map(len, sample)) <= 400 and len(sample) >= 50
    gaps = {int(b) - int(a) for a, b in itertools.pairwise(sample)}
    assert len(gaps) == 1 and int(sample[-1]) > 900
    assert tokenizers.sample_evenly(pieces, max_bytes=4000) == pieces
    assert "".join(tokenizers.sample_evenly(["x" * 200_000], 1 << 20)) == "x" * 200_000


def test_errors_are_one_line(tmp_path, small):
    with pytest.raises(UsageError, match=r"no text to train a tokenizer of"):
        tokenizers.train([], 300)
    with pytest.raises(UsageError, match=r"none\.json: no such file"):
        tokenizers.load(str(tmp_path / "none.json"))
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UsageError, match=r"bad\.json: not a tokenizer that can be loaded \([^\n]*\)$"):
        tokenizers.load(str(tmp_path / "bad.json"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"empty: not a tokenizer that can be loaded"):
        tokenizers.load(str(tmp_path / "empty"))
    content = json.loads(small.backend_tokenizer.to_str().replace("<|endoftext|>", "<x>"))
    (tmp_path / "no_eos.json").write_text(json.dumps(content))
    with pytest.raises(UsageError, match=r"no_eos\.json: the tokenizer has no end-of-text token; set eos_token"):
        tokenizers.load(str(tmp_path / "no_eos.json"))
