"""Exports equal the model they were made from: weights, tokens that begin and end a text, settings, tokenizer."""

import json
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer, processors
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast

import scale.checkpoint.export as exporting
from scale.checkpoint.export import export
from scale.checkpoint.export_tokenizer import save_tokenizer
from scale.config.model import LoraConfig
from scale.data.tokenizer import Encoder, content_hash, train
from scale.errors import ScaleError, UsageError
from scale.models.adapters import add_adapter
from tests.conftest import WORDS

SHAPE = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, head_dim=8, max_position_embeddings=128)  # fmt: skip
IDS = torch.arange(3, 43).view(2, 20)


def texts(n=200):
    rng = random.Random(0)
    return [" ".join(rng.choices(WORDS, k=12)) for _ in range(n)]


@pytest.fixture(scope="module")
def tokenizer():
    return train(texts(), 300)


def model(kind="llama", seed=0, **changes):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**{**SHAPE, **changes}), dtype=torch.float32).eval()


def adapted(base, targets, seed=1):
    made = add_adapter(base, LoraConfig(kind="lora", rank=4, targets=targets), seed=0).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, param in made.named_parameters():
        if "lora_B" in name:  # zero at first: no update
            param.data = torch.randn(param.shape, generator=generator) * 0.1
    return made


def logits(of):
    with torch.no_grad():
        return of.eval()(input_ids=IDS).logits.float()


def config_of(folder, name="config.json"):
    return json.loads((folder / name).read_text())


# merging


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("targets", [["lm_head"], ["q_proj", "lm_head"], ["q_proj", "down_proj"]])
def test_a_merged_export_has_the_logits_of_base_and_adapter(tied, targets, tokenizer, tmp_path):
    run = adapted(model(tie_word_embeddings=tied), targets)
    embedding, expected = run.get_input_embeddings().weight.detach().clone(), logits(run)
    export(run, tokenizer, tmp_path / "out", merge=True)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (logits(loaded) - expected).abs().max() < 1e-5
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    still_tied = tied and "lm_head" not in targets
    assert config_of(tmp_path / "out")["tie_word_embeddings"] == still_tied
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) == (not still_tied)


def test_a_merge_that_changes_the_logits_fails_and_leaves_nothing(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, "merge_adapter", lambda made: made.merge_and_unload())  # as peft does it
    run = adapted(model(tie_word_embeddings=True), ["lm_head"])
    with pytest.raises(ScaleError, match="merging the adapter into the base weights: logits differ by up to"):
        export(run, tokenizer, tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_of_weights_made_at_random_is_of_no_use(tokenizer, tmp_path):
    with pytest.raises(UsageError, match="made at random and are in no folder: export it with --merge"):
        export(adapted(model(), ["q_proj"]), tokenizer, tmp_path / "out")
    with pytest.raises(UsageError, match="no adapter to merge"):
        export(model(), tokenizer, tmp_path / "out", merge=True)
    assert not list(tmp_path.iterdir())


def test_an_adapter_finds_its_base_from_everywhere_and_holds_adapter_weights_only(tokenizer, tmp_path, monkeypatch):
    from peft import AutoPeftModelForCausalLM

    monkeypatch.chdir(tmp_path)
    model(tie_word_embeddings=True).save_pretrained("base")
    run = adapted(AutoModelForCausalLM.from_pretrained("base"), ["q_proj", "lm_head"])
    expected = logits(run)
    export(run, tokenizer, tmp_path / "out", base="base")
    monkeypatch.chdir("/")
    for load in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        assert (logits(load.from_pretrained(tmp_path / "out")) - expected).abs().max() < 1e-5
    assert all("lora_" in name for name in load_file(tmp_path / "out" / "adapter_model.safetensors"))


# the proof


def test_an_export_that_differs_is_refused(tokenizer, tmp_path, monkeypatch):
    load = exporting._loaded

    def another_weight(aside, adapter):
        loaded = load(aside, adapter)
        loaded.model.norm.weight.data[0] += 0.01
        return loaded

    monkeypatch.setattr(exporting, "_loaded", another_weight)
    with pytest.raises(ScaleError, match="the export, loaded again: logits differ by up to"):
        export(model(), tokenizer, tmp_path / "out")

    def another_end(aside, adapter):
        loaded = load(aside, adapter)
        loaded.generation_config = GenerationConfig(eos_token_id=list(range(320)), pad_token_id=0)
        return loaded

    monkeypatch.setattr(exporting, "_loaded", another_end)
    with pytest.raises(ScaleError, match="the export, loaded again: greedy generation differs"):
        export(model(), tokenizer, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_rounded_once_to_the_dtype_that_config_json_names(dtype, tied, tokenizer, tmp_path):
    made = model(tie_word_embeddings=tied)
    expected = {name: tensor.to(dtype) for name, tensor in made.state_dict().items()}
    export(made, tokenizer, tmp_path / "out", dtype=dtype)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(tensor, expected[name]) for name, tensor in stored.items())
    assert config_of(tmp_path / "out")["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == dtype


def test_a_weight_beyond_the_range_of_fp16_is_refused(tokenizer, tmp_path):
    made = model()
    made.model.norm.weight.data[0] = 1e6
    with pytest.raises(UsageError, match=r"a weight of 1e\+06 is beyond the range of torch.float16 \(use bf16\)"):
        export(made, tokenizer, tmp_path / "out", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


# config.json and generation_config.json


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 3.3333333333333335, "rope_theta": 12345.6789}}),
        ("llama", {"attention_dropout": 0.1, "use_cache": False, "pad_token_id": -1}),
        ("gpt2", {}),
        ("gpt_neox", {"tie_word_embeddings": False}),
        ("qwen3", {}),
        ("gemma2", {"sliding_window": 16}),
        ("mixtral", {"num_local_experts": 4}),
        ("gpt_oss", {"num_local_experts": 4, "sliding_window": 16}),
    ],
)
def test_config_json_changes_in_the_tokens_alone(kind, changes, tokenizer, tmp_path):
    made = model(kind, **changes)
    before = made.config.to_dict()
    export(made, tokenizer, tmp_path / "out")
    after = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.to_dict()
    tokens = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 300}
    fixed = {"architectures", "dtype", "transformers_version", "_name_or_path"}
    assert {k: v for k, v in after.items() if k not in fixed} == {
        k: v for k, v in before.items() if k not in fixed
    } | tokens
    ours = config_of(tmp_path / "out", "generation_config.json")
    assert ours == {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def test_the_pad_token_is_no_token_of_a_document(tokenizer, tmp_path):
    """Llamas and others never train the embedding of config.json's pad token."""
    full = train(texts(), 300)
    export(model(vocab_size=300), full, tmp_path / "no_spare")
    assert config_of(tmp_path / "no_spare")["pad_token_id"] is None
    padded = train(texts(), 300)
    padded.add_special_tokens({"pad_token": "<pad>"})
    export(model(pad_token_id=7), padded, tmp_path / "own")
    assert config_of(tmp_path / "own")["pad_token_id"] == padded.pad_token_id
    export(model(pad_token_id=7), tokenizer, tmp_path / "base", base="base")
    assert config_of(tmp_path / "base")["pad_token_id"] == 7
    export(model(pad_token_id=0), tokenizer, tmp_path / "eos", base="base")
    assert config_of(tmp_path / "eos")["pad_token_id"] == 300
    export(model(), tokenizer, tmp_path / "none", base="base")
    assert config_of(tmp_path / "none")["pad_token_id"] is None


@pytest.mark.parametrize(("known", "expected"), [([5, 0], [5, 0]), ([5, 6], 0), (2, 0), (None, 0)])
def test_generation_settings_of_the_base_are_carried_on(known, expected, tokenizer, tmp_path):
    base = {
        "eos_token_id": known,
        "temperature": 0.6,
        "top_p": 0.9,
        "do_sample": False,
        "repetition_penalty": 1.3,
        "x": 1,
    }
    export(model(), tokenizer, tmp_path / "out", generation=base, base="base")
    assert config_of(tmp_path / "out", "generation_config.json") == base | {
        "bos_token_id": 0, "eos_token_id": expected, "pad_token_id": 0,
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == expected and loaded.generation_config.repetition_penalty == 1.3


def test_without_a_tokenizer_the_tokens_of_the_base_stay(tmp_path):
    export(model(eos_token_id=[4, 5]), None, tmp_path / "out", base="base")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.generation_config.eos_token_id == [4, 5] and loaded.config.eos_token_id == [4, 5]
    export(model("gpt2"), None, tmp_path / "random")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "random").generation_config.eos_token_id is None


# the tokenizer


def variants():
    """Tokenizers as they come: with a start token or without, with other tokens around, left cutting and padding."""
    plain = train(texts(), 300)
    yield "plain", plain
    for name in ("bos", "cls", "cuts", "qwen"):
        backend = Tokenizer.from_str(plain.backend_tokenizer.to_str())
        tokens = {"eos_token": "<|endoftext|>"} if name == "qwen" else {"bos_token": "<s>", "eos_token": "</s>"}
        backend.add_special_tokens([t for t in tokens.values() if backend.token_to_id(t) is None])
        ids = {t: backend.token_to_id(t) for t in tokens.values()}
        if name == "bos":
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", ids["<s>"])]
            )
        if name == "cls":
            backend.post_processor = processors.TemplateProcessing(
                single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=list(ids.items())
            )
        if name == "cuts":
            backend.enable_truncation(4)
            backend.enable_padding(length=6)
        if name == "qwen":
            backend.post_processor = processors.ByteLevel(trim_offsets=False)
        yield name, PreTrainedTokenizerFast(tokenizer_object=backend, **tokens)


VARIANTS = dict(variants())


@pytest.fixture(scope="module")
def reloaded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, made in VARIANTS.items():
        save_tokenizer(made, folder / name)
    return {name: AutoTokenizer.from_pretrained(folder / name) for name in VARIANTS}


@pytest.mark.parametrize("name", VARIANTS)
@settings(max_examples=60, derandomize=True, deadline=None)
@given(text=st.text(max_size=60) | st.lists(st.sampled_from([*WORDS, "  ", "\n", "\t"])).map(" ".join))
def test_an_exported_tokenizer_gives_the_ids_of_training(name, reloaded, text):
    made, loaded = VARIANTS[name], reloaded[name]
    start = made.eos_token_id if made.bos_token_id is None else made.bos_token_id
    trained = Encoder(made)([text])[0] or [start, made.eos_token_id]  # of a text without ids nothing is stored
    assert loaded(text).input_ids == trained[:-1]
    assert loaded(text, add_special_tokens=False).input_ids == trained[1:-1]
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == made.decode(trained[1:-1])


def test_what_else_a_tokenizer_holds_stays(reloaded, tmp_path):
    """Training that goes on from an export finds its data tokenised already; the tokenizer of the run is not touched."""
    for name in ("plain", "bos", "qwen"):
        assert content_hash(reloaded[name]) == content_hash(VARIANTS[name])
    assert reloaded["plain"].backend_tokenizer.padding is None and reloaded["cuts"].backend_tokenizer.truncation is None
    assert VARIANTS["cuts"].backend_tokenizer.truncation is not None
    assert VARIANTS["plain"]("fox").input_ids == reloaded["plain"]("fox").input_ids[1:]
    chat = train(texts(), 300)
    chat.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    save_tokenizer(chat, tmp_path)
    said = [{"role": "user", "content": "quick fox"}]
    ours, theirs = chat.apply_chat_template(said), AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(said)
    assert ours["input_ids"] == theirs["input_ids"]
