"""The layers of a config, and the one line that every mistake in one gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scale.config import PretrainRun, differences, load_config, to_yaml
from scale.config.optim import OptimConfig
from scale.errors import UsageError

MINIMAL = """\
version: 1
kind: pretrain
name: small
model:
  preset: tiny
data:
  sources:
    - kind: python-stdlib
    - kind: text
      path: a.txt
  tokenizer:
    vocab_size: 300
  seq_len: 64
batch:
  sequences: 4
train:
  steps: 10
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    return write(tmp_path / "run.yaml", MINIMAL)


def fails(path: Path, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_layers(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "optim: {lr: 1.0, eps: 2.0, clip: 3.0}\n")
    middle = write(tmp_path / "middle.yaml", "extends: base.yaml\noptim: {eps: 20.0, clip: 30.0}\n")
    (tmp_path / "sub").mkdir()
    top = write(tmp_path / "sub" / "top.yaml", f"extends: ../{middle.name}\noptim:\n  clip: 300.0\n")
    optim = load_config(top, ["optim.weight_decay=4000"]).optim
    assert optim == OptimConfig(lr=1.0, eps=20.0, clip=300.0, weight_decay=4000.0, betas=(0.9, 0.95))
    assert load_config(top, ["optim.clip=1", "optim.clip=2"]).optim.clip == 2


def test_lists_replace_and_entries_are_overridden_by_index(tmp_path: Path, minimal: Path) -> None:
    assert [s.kind for s in load_config(minimal).data.sources] == ["python-stdlib", "text"]
    changed = load_config(minimal, ["data.sources.1.path=b.txt", "data.sources.0.weight=2"]).data.sources
    assert (changed[0].weight, changed[1].path) == (2, "b.txt")  # type: ignore[union-attr]
    child = write(tmp_path / "child.yaml", "extends: run.yaml\ndata:\n  sources: [{kind: tokens, path: x}]\n")
    assert [s.kind for s in load_config(child).data.sources] == ["tokens"]
    assert "data.sources has 2 entries" in fails(minimal, "data.sources.2.path=x")
    assert "data.sources has 2 entries" in fails(minimal, "data.sources.-1.path=x")
    assert "adapter.targets.0 = 'q_proj' holds no keys" in fails(
        minimal, "adapter={kind: lora, targets: [q_proj]}", "adapter.targets.0.x=1"
    )


def test_null_takes_a_section_back(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", MINIMAL + "profile: {steps: 1-2}\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\nprofile: null\n")
    assert load_config(child).profile is None
    assert load_config(tmp_path / "base.yaml", ["profile=null"]).profile is None


def test_another_kind_replaces_the_mapping_but_naming_the_open_kind_does_not(tmp_path: Path) -> None:
    write(tmp_path / "open.yaml", MINIMAL + "optim: {weight_decay: 0.5}\n")
    write(tmp_path / "muon.yaml", MINIMAL + "optim: {kind: muon, weight_decay: 0.5}\n")
    child = tmp_path / "child.yaml"
    write(child, "extends: open.yaml\noptim: {kind: adamw, lr: 1.0}\n")
    assert load_config(child).optim.weight_decay == 0.5
    write(child, "extends: muon.yaml\noptim: {lr: 1.0}\n")
    assert load_config(child).optim.kind == "muon"
    write(child, "extends: muon.yaml\noptim: {kind: adamw}\n")
    assert load_config(child).optim.weight_decay == OptimConfig().weight_decay


def test_extends_in_a_circle(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    assert "extends itself through a.yaml -> b.yaml" in fails(tmp_path / "a.yaml")


@pytest.mark.parametrize("parent", ["nowhere.yaml", ".", '"a\\0b"', "3", "[a.yaml]"])
def test_extends_something_else(tmp_path: Path, parent: str) -> None:
    path = write(tmp_path / "a.yaml", f"version: 1\nextends: {parent}\n")
    assert fails(path).startswith(f"{path}:2: extends = ")


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("optim:\n  lr: 1\n  lr: 2\n", 20, "lr is given twice"),
        ("optim: {lr: 1\n", 19, "not valid YAML"),
        ("? [a, b]\n: 1\n", 18, "a key must be a word"),
        ("adapter: &a\n  x: *a\n", 18, "nested too deeply"),
        ("adapter: " + "[" * 3000, None, "nested too deeply"),
        ("name2: !!python/object:os.system x\n", 18, "could not determine a constructor"),
        ("name2: !!int x\n", None, "not valid YAML"),
    ],
)
def test_bad_yaml(tmp_path: Path, text: str, line: int | None, problem: str) -> None:
    path = write(tmp_path / "a.yaml", MINIMAL + text)
    message = fails(path)
    assert message.startswith(f"{path}: " if line is None else f"{path}:{line}: ")
    assert problem in message


def test_a_small_file_cannot_expand_without_end(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert "more than 100,000 values" in fails(write(tmp_path / "a.yaml", "\n".join(lines)))


def test_an_override_changes_one_alias_only(tmp_path: Path) -> None:
    text = MINIMAL.replace(
        "    - kind: python-stdlib\n",
        "    - {kind: jsonl, path: a, columns: &c {text: t}}\n    - {kind: jsonl, path: b, columns: *c}\n",
    )
    run = load_config(write(tmp_path / "a.yaml", text), ["data.sources.0.columns.text=u"])
    assert [s.columns.text for s in run.data.sources[:2]] == ["u", "t"]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xe7", ":1: byte 0xe7 is not UTF-8"),
        (MINIMAL.encode("utf-16"), "is UTF-16; save the file as UTF-8"),
        (MINIMAL.encode("utf-16-le"), ":1: holds the control character 0x00; save the file as plain UTF-8 text"),
        (MINIMAL.encode("utf-32"), "is UTF-32; save the file as UTF-8"),
        (b"\x1f\x8b\x08", "is a gzip archive; save the file as UTF-8"),
        (b"a: 1\nb: \x07\n", ":2: holds the control character 0x07"),
        (b"- 1\n", "expected a mapping of keys such as `name: mine`, found a list"),
        (b"hello\n", "expected a mapping of keys such as `name: mine`, found 'hello'"),
        (b"3\n", "expected a mapping of keys such as `name: mine`, found 3"),
        (b"", "is empty (a run needs version, kind, name, model, data, batch and train)"),
        (b"# nothing\n", "is empty (a run needs version"),
        (b"version: 1\n", "kind, name, model, data, batch and train are required"),
        (b"a:\n\tb: 1\n", ":2: not valid YAML (a tab; indent with spaces)"),
        (b"a: 1\n---\nb: 2\n", ":2: not valid YAML (a second document after ---; one file holds one)"),
        (b"a: *x\n", ":1: not valid YAML (found undefined alias 'x')"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.yaml").write_bytes(content)
    said = fails(tmp_path / "a.yaml")
    assert "\n" not in said and said.startswith(str(tmp_path / "a.yaml")) and message in said
    assert "no such file" in fails(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("seq_len: 64", "seq_len: 1", 13, "data.seq_len = 1: should be greater than or equal to 2"),
        ("preset: tiny", "preset: tny", 5, "did you mean tiny?"),
        ("  seq_len: 64", "  seq_lenn: 64", 13, "data.seq_lenn = 64: unknown key; did you mean data.seq_len?"),
        ("train:", "lr: 3e-4\ntrain:", 16, "lr = 0.0003: unknown key; did you mean optim.lr?"),
        ("steps: 10", "steps: 10\n  tokens: 5", 16, "(given: steps, tokens; steps=null unsets one)"),
        ("kind: text", "kind: txt", 9, "data.sources.1.kind = 'txt': unknown kind; expected one of 'python-stdlib'"),
        ("kind: text", "kind: txt", 9, "did you mean text?"),
        ("    - kind: text\n      path", "    - path", 9, "data.sources.1: needs `kind` (one of python-stdlib, text, jsonl"),
        ("path: a.txt", "text: a.txt", 9, "data.sources.1.path: is required"),
        ("path: a.txt", "pth: a.txt", 10, "data.sources.1.pth = 'a.txt': unknown key; did you mean data.sources.1.path?"),
        ("- kind: python-stdlib", "- python-stdlib", 8, "data.sources.0 = 'python-stdlib': expected a mapping of keys"),
        ("kind: text", "kind: huggingface\n      streaming: true", 9, "data.sources.1: streaming needs max_documents"),
        ("name: small", "name: 2024", 3, "name = 2024: expected text"),
        ("name: small", "name: a/b", 3, "name = 'a/b': "),
        ("name: small\n", "", None, "name: is required"),
        ("sequences: 4", "sequences: true", 15, "expected a whole number, not true or false"),
        ("sequences: 4", "tokens: 100", None, "batch.tokens = 100 is not a multiple of data.seq_len = 64"),
    ],
)  # fmt: skip
def test_messages_say_line_key_value_and_fix(
    tmp_path: Path, old: str, new: str, line: int | None, message: str
) -> None:
    assert MINIMAL.count(old) == 1
    path = write(tmp_path / "a.yaml", MINIMAL.replace(old, new))
    place = f"{path}: " if line is None else f"{path}:{line}: "
    lines = fails(path).splitlines()
    assert any(said.startswith(place) and message in said for said in lines), lines


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("name=../evil", "expected 1 to 100 letters, digits, dots, dashes or underscores, a letter or digit first"),
        ("optim.lr=fast", "expected a number"),
        ("optim.lr=true", "expected a number, not true or false"),
        ("seed=false", "expected a number, not true or false"),
        ("optim.lr=.nan", "expected a finite number"),
        ("seed=1.5", "expected a whole number"),
        ("seed=x", "expected a whole number"),
        ("seed=-1", "should be greater than or equal to 0"),
        ("monitor.progress=maybe", "expected true or false"),
        ("data.curriculum=[{}]", "until and seq_len are required"),
        ("extends=a.yaml", "`extends` works in files only"),
    ],
)
def test_messages_are_in_the_words_of_a_config(minimal: Path, override: str, said: str) -> None:
    message = fails(minimal, override)
    assert message.startswith("command line: ") and override.partition("=")[0] in message and said in message
    assert "\n" not in message and not any(word in message for word in ("[A-Z", "valid", "parse", "Input", "String"))


def test_messages_name_the_file_the_value_came_from(tmp_path: Path) -> None:
    base = write(tmp_path / "base.yaml", MINIMAL + "optim:\n  lr: -1\n  eps: -1\n  clip: -1\n")
    child = write(tmp_path / "child.yaml", "extends: base.yaml\noptim:\n  eps: -2\n")
    places = [line.split(" = ")[0] for line in fails(child, "optim.clip=-3").splitlines()]
    assert places == [f"{base}:19: optim.lr", f"{child}:3: optim.eps", "command line: optim.clip"]
    write(child, "extends: base.yaml\noptim: {lr: 1, eps: 1, clip: 1}\ntrain: {tokens: 5}\n")
    assert fails(child).startswith(f"{child}:3: train: give exactly one of")


def test_one_line_for_a_value_that_fits_no_member_of_a_union(minimal: Path) -> None:
    for value in ("often", "{a: 1}", "[1]"):
        message = fails(minimal, f"compute.recompute={value}")
        assert message.startswith("command line: compute.recompute")
        assert "expected 'auto' or 'off'; or " in message
        assert "\n" not in message and "function" not in message


@pytest.mark.parametrize("override", ["", "optim.lr", "=3", "optim.lr={", "optim.lr=" + "[" * 3000])
def test_bad_overrides(minimal: Path, override: str) -> None:
    assert fails(minimal, override).startswith("command line: ")


@pytest.mark.parametrize("text", ["3e-4", "3E-4", "3.0e-4", ".3e-3", "0.0003", "+3e-4", "30e-5"])
def test_learning_rates_without_a_dot_are_numbers(tmp_path: Path, minimal: Path, text: str) -> None:
    path = write(tmp_path / "a.yaml", MINIMAL + f"optim: {{lr: {text}}}\n")
    assert load_config(path).optim.lr == load_config(minimal, [f"optim.lr={text}"]).optim.lr == pytest.approx(3e-4)
    free = load_config(
        minimal, [f"model.overrides.initializer_range={text}"]
    ).model.overrides  # not typed by the schema
    assert free == {"initializer_range": pytest.approx(3e-4)}


@pytest.mark.parametrize("word", ["off", "default"])
def test_off_is_a_word(minimal: Path, word: str) -> None:
    assert load_config(minimal, [f"compute.compile={word}"]).compute.compile == word
    assert load_config(minimal, ["compute.recompute=off"]).compute.recompute == "off"


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64k", 64_000),
        ("64K", 64_000),
        ("1.5M", 1_500_000),
        ("300B", 300_000_000_000),
        ("0.5T", 500_000_000_000),
        ("1_000", 1000),
        ("1e6", 1_000_000),
        ("'90071992547409931'", 90_071_992_547_409_931),  # beyond what a float holds
        ("1" + "0" * 18, 10**18),
    ],
)
def test_counts(minimal: Path, text: str, count: int) -> None:
    assert load_config(minimal, [f"eval.tokens={text}"]).eval.tokens == count


@pytest.mark.parametrize(
    "text",
    [
        "0",
        "-1",
        "1.5",
        "1.0005k",
        "64kb",
        "k",
        "''",
        ".inf",
        ".nan",
        "true",
        "1e400",
        "null",
        "1" + "0" * 400,
        "9000000T",
    ],
)
def test_not_counts(minimal: Path, text: str) -> None:
    assert fails(minimal, f"eval.tokens={text}").startswith("command line: eval.tokens")


def test_warmup_is_a_fraction_or_steps(minimal: Path) -> None:
    for text, value in {"0.5": 0.5, "20": 20, "1.0": 1.0, "0": 0}.items():
        assert load_config(minimal, [f"schedule.warmup={text}"]).schedule.warmup == value
    assert "ambiguous" in fails(minimal, "schedule.warmup=1")
    assert "schedule.warmup = -1" in fails(minimal, "schedule.warmup=-1")


def test_differences_are_dotted(minimal: Path) -> None:
    old = load_config(minimal)
    new = load_config(minimal, ["optim.lr=1", "data.sources.1.path=b.txt"])
    assert differences(old, new) == {"data.sources.1.path": ("a.txt", "b.txt"), "optim.lr": (3e-4, 1.0)}


@pytest.mark.parametrize("name", ["1e5", "3e-4", "off", "2020-01-01", "010", "null", "1_000", "a"])
def test_a_resolved_config_reads_back(tmp_path: Path, minimal: Path, name: str) -> None:
    run = load_config(minimal, [f"name='{name}'", "optim.eps=1e-12", "optim.lr=1e20"])
    text = to_yaml(run)
    assert load_config(write(tmp_path / "again.yaml", text)) == run
    assert yaml.safe_load(text)["name"] == name  # plain YAML 1.1 agrees


# fmt: off
KEYS = st.sampled_from([
    "version", "kind", "name", "model", "preset", "path", "overrides", "data", "sources", "seq_len", "curriculum", "until",
    "batch", "tokens", "train", "steps", "optim", "lr", "extends", "adapter", "text", "lora", "schedule", "warmup",
    "compute", "recompute", "eval", "early_stop", "profile", "columns", "<<",
])
# fmt: on
SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.dates() | st.binary(max_size=4)
) | st.sampled_from(["pretrain", "tiny", "text", "lora", "off", "3e-4", "64k", 1, 10**400, "huggingface"])
WILD = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(KEYS | st.text(max_size=5) | st.integers() | st.none() | st.booleans(), inner, max_size=5)
    ),
    max_leaves=15,
)


def valid_or_explained(path: Path, overrides: list[str]) -> None:
    try:
        run = load_config(path, overrides)
    except UsageError as error:
        assert str(error).strip()
    else:
        assert isinstance(run, PretrainRun)
        again = path.with_name("again.yaml")
        again.write_text(to_yaml(run), encoding="utf-8")
        assert not differences(load_config(again), run)


wild = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@wild
@given(content=WILD)
def test_wild_files(tmp_path: Path, content: Any) -> None:
    valid_or_explained(write(tmp_path / "wild.yaml", yaml.safe_dump(content, allow_unicode=True)), [])


@wild
@given(
    at=st.sampled_from([*PretrainRun.model_fields, "data.sources.0", "data.sources", "data.tokenizer"]),
    value=WILD,
)
def test_wild_values_in_a_good_file(tmp_path: Path, at: str, value: Any) -> None:
    content = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6).removesuffix("...\n")
    valid_or_explained(write(tmp_path / "run.yaml", MINIMAL), [f"{at}={content}"])


@wild
@given(
    overrides=st.lists(
        st.text(max_size=20) | st.builds("{}.{}={}".format, KEYS, KEYS | st.integers(), SCALARS), max_size=3
    )
)
def test_wild_overrides(tmp_path: Path, overrides: list[str]) -> None:
    valid_or_explained(write(tmp_path / "run.yaml", MINIMAL), overrides)


@wild
@given(text=st.text())
def test_wild_text(tmp_path: Path, text: str) -> None:
    (tmp_path / "wild.yaml").write_bytes(text.encode("utf-8", "surrogatepass"))
    valid_or_explained(tmp_path / "wild.yaml", [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["compute.strategy=single", "compute.fsdp.offload=true"],
            "compute.fsdp.offload = true: read by strategy fsdp",
        ),
        (["compute.strategy=deepspeed", "compute.fsdp.shard=4"], "compute.strategy = 'deepspeed'"),
        (
            ["compute.strategy=fsdp", "compute.deepspeed.stage=2"],
            "compute.deepspeed.stage = 2: read by strategy deepspeed",
        ),
    ],
)
def test_options_of_another_strategy_than_the_one_named(minimal: Path, words: list[str], said: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_config(minimal, words)
    assert said in str(refused.value) and "\n" not in str(refused.value)
    load_config(minimal, ["compute.strategy=auto", words[1]])
    load_config(minimal, [words[0], "compute.fsdp.shard=all", "compute.deepspeed.stage=3"])  # as if not given
