"""Help without waiting, and a name that was mistyped is met half-way."""

from __future__ import annotations

import subprocess
import sys

import pytest

from scale.cli.main import main

VERBS = ["train", "doctor", "plot", "generate", "export", "plan", "forecast", "data"]


@pytest.mark.parametrize(("words", "said"), [
    (["trian", "configs/demo.yaml"], "did you mean train?"),
    (["doctr"], "did you mean doctor?"),
    (["data", "tokenise", "x", "--out", "y"], "did you mean tokenize?"),
    (["zzz"], "invalid choice: 'zzz'"),
])  # fmt: skip
def test_unknown_verbs(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    error = capsys.readouterr().err
    assert ended.value.code == 2 and said in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("words", [[], *([verb] for verb in VERBS)], ids=str)
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom scale.cli.main import main\n"
        f"try: main({[*words, '--help']!r})\nexcept SystemExit: pass\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'transformers', 'numpy', 'pydantic'}))"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ran.stdout.startswith("usage: scale") and ran.stdout.splitlines()[-1] == "[]" and ran.stderr == ""
