"""Text beyond ASCII where the locale knows ASCII alone: no verb may end in a traceback."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import tiny_run

ROOT = Path(__file__).parents[1]
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HF_HUB_OFFLINE": "1"}


def scale(folder, *words, code=0):
    """The installed command, which must know nothing but ASCII; its output as bytes."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONIOENCODING", "LANG")} | ASCII
    command = [sys.executable, "-m", "scale.cli.main", *words]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, timeout=300, check=False)
    assert b"Traceback" not in done.stderr and done.returncode == code, done.stderr.decode()
    assert (done.stdout + done.stderr).isascii()
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    lines = "".join(json.dumps({"text": f"Größe {i}: 中文 «{i}»"}, ensure_ascii=False) + "\n" for i in range(60))
    (folder / "corpus.jsonl").write_text(lines, encoding="utf-8")
    content = tiny_run(folder, train={"steps": 2}) | {"runs_dir": "runs"}
    text = "# Größe\n" + yaml.safe_dump(content, allow_unicode=True)
    (folder / "run.yaml").write_text(text, encoding="utf-8")
    return folder


def test_data_commands(home):
    assert b"Gr\\xf6\\xdfe" in scale(home, "data", "inspect", "corpus.jsonl")
    (home / "bad.jsonl").write_text('{"größe": "中文"}\n{"größe": ', encoding="utf-8")
    assert b"cut off" in scale(home, "data", "validate", "bad.jsonl", "--text", "größe", code=1)
    # the bytes of an argument are kept as they are: a file of that name is found
    (home / "größ.jsonl").write_text('{"text": "da"}\n', encoding="utf-8")
    assert b"da" in scale(home, "data", "inspect", "größ.jsonl")


@pytest.mark.slow
def test_every_verb(home):
    for words in ("", "train", "generate", "export", "plan", "forecast", "doctor", "plot", "data", "data clean"):
        scale(home, *words.split(), "--help")
    scale(home, "doctor")
    scale(home, "train", "run.yaml")
    scale(home, "generate", "runs/tiny", "--prompt", "Größe 中", "--max-new-tokens", "5")
    scale(home, "plot", "runs/tiny")
    scale(home, "export", "runs/tiny", "--out", "exported")
    scale(home, "plan", "run.yaml", "--gpus", "1", "--gpu", "h100")
    for words in ("clean corpus.jsonl --out clean.jsonl", "split corpus.jsonl --out parts"):
        scale(home, "data", *words.split())
    scale(home, "data", "tokenize", "corpus.jsonl", "--out", "store", "--vocab-size", "300")
    assert json.loads((home / "clean.jsonl").read_text(encoding="utf-8").splitlines()[0])["text"].startswith("Größe 0")


def texts_without_encoding(path):
    """Lines of calls that open a file as text, or read a process as text, in the encoding of the locale."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        given = {keyword.arg for keyword in node.keywords}
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        opens = name == "open" and modes and set(modes[-1]) <= set("rwax+t")
        runs = name in ("run", "Popen") and "text" in given
        if "encoding" not in given and (opens or runs or name in ("read_text", "write_text")):
            yield f"{path.relative_to(ROOT)}:{node.lineno}: {name}"


@pytest.mark.parametrize("folder", ["scale", "kernels", "launch", "examples", "benchmarks"])
def test_every_text_file_is_opened_as_utf_8(folder):
    found = [line for path in sorted((ROOT / folder).rglob("*.py")) for line in texts_without_encoding(path)]
    assert not found
