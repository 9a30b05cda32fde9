"""Bad configs, arguments, data and models through the real command: one line with value, place and fix; nothing stays."""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from tests.refusal import REMOVED, Home, Refuse, in_a_process, one_line


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield Home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def refuse(home, tmp_path, capsys):
    return Refuse(home, tmp_path, capsys)


CURRICULUM = "data.curriculum"
BASE = {"kind": "jsonl", "path": "corpus.jsonl"}
CONFIGS = {
    "unknown key": ({"lerning_rate": 1}, ["run.yaml:", "lerning_rate = 1: unknown key"]),
    "unknown key in a section": (
        {"optim.learning_rate": 1}, ["run.yaml:", "optim.learning_rate = 1: unknown key", "lr"]),
    "misspelt key": ({"data.sequence_length": 64}, ["run.yaml:", "did you mean data.seq_len?"]),
    "misspelt deep key": (
        {"train.spike.sigm": 3}, ["run.yaml:", "train.spike.sigm = 3", "did you mean train.spike.sigma?"]),
    "misspelt key in a list": ({"data.sources.0.pth": "x"}, ["run.yaml:", "did you mean data.sources.0.path?"]),
    "misspelt section": ({"modle": {}}, ["run.yaml:", "modle: unknown key; did you mean model?"]),
    "key in the wrong section": ({"seq_len": 64}, ["seq_len = 64: unknown key; did you mean data.seq_len?"]),
    "negative size": ({"batch.sequences": -8}, ["run.yaml:", "batch.sequences = -8: should be greater than 0"]),
    "zero steps": ({"train.steps": 0}, ["run.yaml:", "train.steps = 0: should be greater than 0"]),
    "absurd count": ({"eval.tokens": 10**30}, ["run.yaml:", "eval.tokens = 1000", "at most 10^18"]),
    "absurd threads": (
        {"compute.threads": 10**9}, ["compute.threads = 1000000000: should be less than or equal to 1024"]),
    "absurd batch": (
        {"batch.sequences": 10**12}, ["batch: 64,000,000,000,000 tokens in one step; at most 1,073,741,824"]),
    "absurd vocabulary": (
        {"data.tokenizer.vocab_size": "1B"}, ["vocab_size = '1B': should be less than or equal to 1048576"]),
    "text for a count": ({"train.steps": "many"}, ["train.steps = 'many': expected a whole number such as 65536, 64k"]),
    "true for a count": ({"train.steps": True}, ["train.steps = True: expected a whole number, not true or false"]),
    "text for a number": ({"optim.lr": "hot"}, ["optim.lr = 'hot': expected a number"]),
    "not a number": ({"optim.lr": float("nan")}, ["optim.lr = nan: expected a finite number"]),
    "number for a section": ({"optim": 3}, ["optim = 3: expected a mapping of keys"]),
    "number for a text": ({"name": 7}, ["name = 7: expected text"]),
    "name that leaves the folder": ({"name": "../x"}, ["name = '../x'"]),
    "steps and tokens": (
        {"train.tokens": "1M"}, ["run.yaml:", "train: give exactly one of steps, tokens, epochs (given: steps"]),
    "no length": ({"train.steps": REMOVED}, ["train: give exactly one of steps, tokens, epochs (given: none)"]),
    "batch not a multiple": (
        {"batch": {"tokens": 1000}}, ["batch.tokens = 1000 is not a multiple of data.seq_len = 64"]),
    "micro does not divide": ({"batch.micro": 3}, ["batch.micro = 3 does not divide the 8 rows of a step"]),
    "curriculum falls": (
        {CURRICULUM: [{"until": 0.5, "seq_len": 32}, {"until": 0.4, "seq_len": 16}]}, ["run.yaml:", "must both rise"]),
    "curriculum does not divide": (
        {CURRICULUM: [{"until": 0.5, "seq_len": 24}]}, ["seq_len 24 must divide data.seq_len 64"]),
    "curriculum too long": (
        {CURRICULUM: [{"until": 0.5, "seq_len": 128}]}, ["seq_len 128 must be below data.seq_len 64"]),
    "no version": ({"version": REMOVED}, ["run.yaml: version: is required"]),
    "version 2": ({"version": 2}, ["run.yaml:", "version = 2: expected 1"]),
    "unknown stage": (
        {"kind": "pretrian"}, ["run.yaml:", "kind = 'pretrian': expected 'pretrain'; did you mean pretrain?"]),
    "unknown source": ({"data.sources.0.kind": "json"}, ["data.sources.0.kind = 'json'", "did you mean jsonl?"]),
    "small vocabulary": (
        {"data.tokenizer.vocab_size": 257}, ["vocab_size = 257: should be greater than or equal to 258"]),
    "everything held out": ({"data.held_out.fraction": 1}, ["data.held_out.fraction = 1: should be less than 1"]),
    "adapter on a preset": ({"adapter": {"kind": "lora"}}, ["adapter: an adapter on a preset", "use model.path"]),
    "unknown device": ({"compute.device": "gpu"}, ["compute.device = 'gpu': expected 'auto', 'cpu', 'cuda' or 'mps'"]),
    "flash attention on a CPU": (
        {"compute.device": "cpu", "compute.attention": "flash_attention_2"},
        ["compute.attention = 'flash_attention_2'", "use sdpa"]),
    "memory profile on a CPU": (
        {"compute.device": "cpu", "profile": {"steps": "1-2", "memory": True}}, ["profile.memory = true", "need CUDA"]),
    "rows beyond the model": (
        {"data.seq_len": 4096}, ["data.seq_len = 4096: the model's max_position_embeddings is 2048"]),
    "unknown override": ({"model.overrides.hiden": 3}, ["model.overrides.hiden: LlamaConfig has no such field"]),
    "text for an override": (
        {"model.overrides.hidden_size": "big"}, ["model.overrides.hidden_size = 'big': expected int"]),
    "negative override": ({"model.overrides.num_hidden_layers": -1}, ["num_hidden_layers = -1: should be 1 or more"]),
    "unknown activation": (
        {"model.overrides.hidden_act": "silou"}, ["model.overrides.hidden_act = 'silou': transformers has no such", "silu"]),
    "unknown rotary positions": (
        {"model.overrides.rope_parameters": {"rope_type": "yam"}}, ["model.overrides.rope_parameters", "'yam'", "yarn"]),
    "heads that do not divide": (
        {"model.overrides.num_attention_heads": 5}, ["model.overrides.num_attention_heads = 5: should divide hidden_size ="]),
    "a rate above one": ({"model.overrides.attention_dropout": 2}, ["model.overrides.attention_dropout = 2: should be a rate"]),
    "padding outside the vocabulary": (
        {"model.overrides.pad_token_id": 10**6}, ["model.overrides.pad_token_id = 1000000: the vocabulary has"]),
    "shapes that do not fit": (
        {"model.overrides.num_key_value_heads": 3},
        ["model.overrides.num_key_value_heads = 3: should divide num_attention_heads ="]),
    "an override that nothing reads": ({"model.overrides.dtype": "bfloat16"}, ["dtype = 'bfloat16'", "use compute.precision"]),
    "model beyond the memory": (
        {"model.overrides.hidden_size": 2**28}, ["model: the weights and gradients of", "GiB (use a smaller"]),
    "tokenizer beyond the model": (
        {"model.overrides.vocab_size": 100}, ["100 entries", "id 299", "300 entries", "another tokenizer"]),
    "no such model folder": (
        {"model": {"path": "./nowhere"}}, ["model.path = './nowhere': no such folder (working folder"]),
    "no such tokenizer": ({"data.tokenizer": {"path": "/nowhere"}}, ["/nowhere: no such file or folder"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGS)
def test_config(name, home, refuse, tmp_path):
    changes, fragments = CONFIGS[name]
    refuse("train", home.write(tmp_path, changes), fragments=fragments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(home, refuse, tmp_path):
    refuse(
        "train",
        home.write(tmp_path, {"compute.device": "cuda"}),
        fragments=["compute.device = 'cuda'", "it has:", "cpu"],
    )


def test_a_missing_extra(home, refuse, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr("scale.monitor.trackers.find_spec", lambda name: None if name == "wandb" else found(name))
    path = home.write(tmp_path, {"monitor.wandb": {"project": "x"}})
    refuse("train", path, fragments=["monitor.wandb needs an extra", "pip install 'scale-trainer[wandb]'"])


FILES = {
    "not UTF-8": (b"version: 1\nname: \xff\xfe\n", ["bad.yaml:2: byte 0xff is not UTF-8"]),
    "invalid YAML": (b"a: [1\nb: }", ["bad.yaml:2: not valid YAML"]),
    "duplicate key": (b"version: 1\nname: a\nname: b\n", ["bad.yaml:3: name is given twice"]),
    "a list": (b"- 1\n", ["bad.yaml: expected a mapping of keys such as `name: mine`, found a list"]),
    "a YAML tag that runs code": (b"name: !!python/object/apply:os.abort []\n", ["bad.yaml:1: not valid YAML"]),
    "extends itself": (b"extends: bad.yaml\n", ["bad.yaml: extends itself through bad.yaml"]),
    "extends nothing": (b"version: 1\nextends: none.yaml\n", ["bad.yaml:2: extends = 'none.yaml': no such file"]),
}


@pytest.mark.parametrize("name", FILES)
def test_config_file(name, refuse, tmp_path):
    content, fragments = FILES[name]
    (tmp_path / "bad.yaml").write_bytes(content)
    refuse("train", tmp_path / "bad.yaml", fragments=fragments)


def test_config_that_is_no_file(refuse, tmp_path):
    refuse("train", tmp_path / "none.yaml", fragments=["none.yaml: no such file (working folder"])
    refuse("train", tmp_path, fragments=[str(tmp_path), "cannot be read as a YAML file (Is a directory)"])


@pytest.mark.parametrize(
    ("override", "fragments"),
    [
        ("optim.lr", ["command line: 'optim.lr': expected key.sub=value"]),
        ("=3", ["command line: '=3': expected key.sub=value"]),
        ("optim.lr=[", ["command line: optim.lr = '[': not valid YAML"]),
        ("optim.lr=-1", ["command line: optim.lr = -1: should be greater than 0"]),
        ("data.sources.3.path=x", ["command line: data.sources.3.path: data.sources has 1 entries, counted from 0"]),
    ],
)
def test_override(override, fragments, home, refuse, tmp_path):
    refuse("train", home.write(tmp_path, {}), override, fragments=fragments)


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def array(values, dtype=np.uint16, cut=0, **options):
    def write(path):
        np.save(path, np.array(values, dtype=dtype), **options)
        path.write_bytes(path.read_bytes()[: -cut or None])

    return write


class Bomb:
    """Unpickled, it would leave a mark."""

    def __reduce__(self):
        return eval, ("open('unpickled', 'w')",)


IDS = {"columns": {"input_ids": "ids"}}
LABELS = {"columns": {"input_ids": "ids", "labels": "labels"}}
ROWS = np.arange(640).reshape(10, 64)
DATA = {
    "missing file": ("no.jsonl", None, {}, ["no.jsonl: no such file or folder"]),
    "glob without match": ("*.nope", None, {"kind": "text"}, ["*.nope: no file matches this pattern"]),
    "empty file": ("empty.jsonl", b"", {}, ["empty.jsonl: holds no documents"]),
    "empty text": ("empty.txt", b"", {}, ["empty.txt: holds no text to train a tokenizer of 300 entries on"]),
    "empty folder": ("folder", "folder", {"kind": "text"}, ["folder: the folder holds no files"]),
    "binary data": ("data.txt", b"a\nb\0\xff", {}, ["data.txt:2: binary data (a NUL byte at byte 1", "expected UTF-8"]),
    "not UTF-8": ("data.txt", b"caf\xe9\n", {}, ["data.txt:1: not UTF-8: byte 0xe9 at byte 3", "convert"]),
    "truncated JSONL": (
        "cut.jsonl", lines({"text": "a"}) + b'{"text": "ab', {}, ["cut.jsonl:2: the JSON object is cut off"]),
    "not an object": ("list.jsonl", lines({"text": "a"}, [1]), {}, ["list.jsonl:2: expected a JSON object", "[1]"]),
    "missing column": ("col.jsonl", lines({"txt": "a"}), {}, ["col.jsonl:1: no column 'text'", "did you mean 'txt'?"]),
    "column that is no text": (
        "col.jsonl", lines({"text": 5}), {}, ["col.jsonl:1: column 'text' holds a number ('5')"]),
    "nothing to learn": (
        "ids.jsonl", lines({"ids": [1, 2], "labels": [-100, -100]}), LABELS,
        ["ids.jsonl: no document has a token to learn", "labels"]),
    "labels of another length": (
        "ids.jsonl", lines({"ids": [1, 2, 3], "labels": [1, 2]}), LABELS, ["ids.jsonl:1: labels has 2 entries and ids 3"]),
    "negative id": (
        "ids.jsonl", lines({"ids": [1, -2]}), IDS, ["ids.jsonl:1: ids[1] = -2: token ids are never negative"]),
    "documents of one token": (
        "ids.jsonl", lines({"ids": [1]}, {"ids": [2]}), IDS, ["ids.jsonl: no document has a token to learn"]),
    "not Parquet": ("x.parquet", b"no", {}, ["x.parquet: not a readable Parquet file"]),
    "one document": (
        "one.txt", b"one document", {}, ["one.txt: data.held_out.fraction = 0.1", "set the fraction to 0"]),
    "truncated array": ("cut.npy", array(ROWS, cut=10), {}, ["cut.npy: not a complete .npy array"]),
    "array of floats": (
        "f.npy", array(ROWS, np.float64), {}, ["f.npy: float64 array", "expected uint16, uint32 or int64"]),
    "array of one dimension": (
        "a.npy", array(ROWS[0]), {}, ["a.npy: uint16 array of shape (64,): expected rows x seq_len"]),
    "array of objects": (
        "o.npy", array([[1, Bomb()]], object, allow_pickle=True), {}, ["o.npy: not a complete .npy array", "objects"]),
    "a pickle": ("p.npy", pickle.dumps(Bomb()), {}, ["p.npy: not a complete .npy array"]),
    "several arrays": (
        "z.npy", lambda path: np.savez(path.open("wb"), a=ROWS), {}, ["z.npy: not a complete .npy array"]),
    "negative array": ("n.npy", array(-ROWS, np.int64), {}, ["n.npy: row 0: token id -63 is negative"]),
    "rows of one token": ("n.npy", array(ROWS[:, :1]), {}, ["data.sources: packed: no document", "two tokens"]),
    "ids beyond the model": (
        "v.npy", array(ROWS), {}, ["its vocabulary has 512 entries", "up to id 639", "vocab_size"]),
}  # fmt: skip
KINDS = {"jsonl": "jsonl", "txt": "text", "parquet": "parquet", "npy": "packed"}


@pytest.mark.parametrize("name", DATA)
def test_data(name, home, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file, content, more, fragments = DATA[name]
    if content == "folder":
        (tmp_path / file).mkdir()
    elif callable(content):
        content(tmp_path / file)
    elif content is not None:
        (tmp_path / file).write_bytes(content)
    source = {"kind": KINDS.get(file.split(".")[-1]), "path": file} | more
    changes = {"data.sources": [source], "data.cache": str(tmp_path / "cache")}
    if "columns" in source or source["kind"] == "packed":
        changes |= {"data.tokenizer": REMOVED, "model.overrides.vocab_size": 512}
    refuse("train", home.write(tmp_path, changes), fragments=fragments)


def test_ids_beyond_the_tokenizer(home, refuse, tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_bytes(lines({"ids": [1, 2]}, {"ids": [1, 3000]}))
    source = {"kind": "jsonl", "path": str(file), **IDS}
    path = home.write(tmp_path, {"data.sources": [source], "data.tokenizer": {"path": str(home.export)}})
    refuse("train", path, fragments=["ids.jsonl:2: token id 3000, but the tokenizer has only 300 entries"])


def change(path, at, value=None):
    """One byte of a file changed, or the file cut there."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content if value is None else content[:at])


@pytest.mark.parametrize(
    ("damage", "fragments"),
    [
        (lambda s: change(s / "train-00000.tokens.npy", -7, "cut"),
         ["train-00000.tokens.npy:", "bytes instead of", "delete the folder", "scale data tokenize"]),
        (lambda s: change(s / "manifest.json", 40), ["manifest.json:", "tokenize"]),
        (lambda s: change(s / "manifest.json", -9),
         ["manifest.json: its content does not match its SHA-256", "delete the folder", "scale data tokenize"]),
        (lambda s: (s / "manifest.json").unlink(),
         ["store/manifest.json: cannot be read (No such file or directory)", "scale data tokenize"]),
        (lambda s: shutil.rmtree(s / "tokenizer"),
         ["store/tokenizer/tokenizer.json: cannot be read", "delete the folder", "scale data tokenize"]),
    ],
)  # fmt: skip
def test_damaged_token_store(damage, fragments, home, refuse, tmp_path):
    store = shutil.copytree(home.folder / "store", tmp_path / "store")
    damage(store)
    source = {"kind": "tokens", "path": str(store)}
    refuse("train", home.write(tmp_path, {"data.sources": [source], "data.tokenizer": REMOVED}), fragments=fragments)


def test_a_vocabulary_too_large_for_the_type(home, refuse, tmp_path):
    vocabulary = {str(i): i for i in range(2**16)} | {"<|endoftext|>": 2**16}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "large")
    words = [
        "data",
        "tokenize",
        home.folder / "corpus.jsonl",
        "--out",
        tmp_path / "out",
        "--tokenizer",
        tmp_path / "large",
    ]
    refuse(*words, "--dtype", "uint16", fragments=["dtype uint16", "65537 entries; use uint32"])


def without_weights(model):
    (model / "model.safetensors").unlink()
    torch.save({"a": Bomb()}, model / "pytorch_model.bin")


def with_config(**changes):
    def edit(model):
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | changes))
        (model / "mine.py").write_text("open('unpickled', 'w')\n")

    return edit


@pytest.mark.parametrize(
    ("damage", "changes", "fragments"),
    [
        (without_weights, {}, ["hf': holds no .safetensors file", "pytorch_model.bin", "save_pretrained"]),
        (lambda m: change(m / "model.safetensors", -100, "cut"), {},
         ["model.safetensors: cut off", "incomplete", "copy it again"]),
        (with_config(num_hidden_layers=3), {}, ["hf': 9 of its weights do not fit its config.json", "model.layers.2"]),
        (with_config(auto_map={"AutoConfig": "mine.A"}, model_type="mine"), {},
         ["model_type = 'mine'", "auto_map, is never run"]),
        (lambda m: (m / "config.json").write_text("{"), {}, ["config.json:1: not valid JSON", "save the model again"]),
        (lambda m: None, {"model.overrides": {"hidden_size": 3}},
         ["overrides: would not fit pretrained weights", "init: random"]),
        (lambda m: None, {"adapter": {"kind": "lora", "targets": ["q"]}},
         ["adapter.targets: 'q' is no linear module", "q_proj"]),
        (lambda m: None, {"adapter": {"kind": "lora", "rank": "1M"}},
         ["adapter.rank = 1000000", "a rank of at most 32"]),
        (lambda m: None, {"data.seq_len": 4096}, ["data.seq_len = 4096: the model's max_position_embeddings is 2048"]),
    ],
)  # fmt: skip
def test_model_folder(damage, changes, fragments, home, refuse, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = shutil.copytree(home.export, tmp_path / "hf")
    damage(model)
    path = home.write(tmp_path, {"model": {"path": str(model)}, "data.tokenizer": {"path": str(home.export)}} | changes)
    refuse("train", path, fragments=fragments)


def test_exit_codes_of_the_installed_command(home, tmp_path):
    for words, fragments in (
        (["train", home.write(tmp_path, {"optim.learning_rate": 1})], ["run.yaml:", "optim.learning_rate = 1"]),
        (["train", tmp_path / "run.yaml", "--bogus"], ["unrecognized arguments: --bogus", "--help"]),
        (["data", "validate", tmp_path / "none"], ["none: no such file or folder"]),
    ):
        done = in_a_process(*words)
        assert done.returncode == 2 and not done.stdout
        one_line(done.stderr, fragments)
