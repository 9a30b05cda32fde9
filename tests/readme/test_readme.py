"""The commands and the code that README and docs show, run as they stand."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from scale.cli.main import main
from tests.conftest import metrics_of

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", *(str(p.relative_to(ROOT)) for p in sorted((ROOT / "docs").glob("*.md")))]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.M | re.S)


def commands(page: str) -> list[list[str]]:
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.strip()]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """A folder with the configs in it, as after a clone. One thread each: tests run beside each other."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.timeout(500)
@pytest.mark.parametrize("page", [p for p in PAGES if any(c[0] == "scale" for c in commands(p))])
def test_scale_commands_run_in_their_order(page, elsewhere):
    for command in commands(page):
        if command[0] == "scale":
            done = subprocess.run(
                [sys.executable, "-m", "scale.cli.main", *command[1:]], capture_output=True, text=True, timeout=400
            )
            assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout[-1000:]}\n{done.stderr[-1000:]}"


def test_make_targets_exist():
    targets = [c[1] for page in PAGES for c in commands(page) if c[0] == "make"]
    assert {"demo", "test"} <= set(targets)
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0, target


def scripts() -> list[list[str]]:
    """Commands of all pages that run a file of the repository, from that file on."""
    found = []
    for command in (c for page in PAGES for c in commands(page)):
        at = [i for i, word in enumerate(command) if word.startswith(("launch/", "slurm/", "benchmarks/"))]
        found += [command[at[0] :]] if at else []
    return found


def test_scripts_that_pages_name_exist_and_answer():
    assert {"launch/torchrun.sh", "launch/preflight.py", "launch/ray_train.py"} <= {c[0] for c in scripts()}
    for name in sorted({command[0] for command in scripts()}):
        assert (ROOT / name).is_file(), name
        if name.startswith("launch/"):
            runner = ["bash"] if name.endswith(".sh") else [sys.executable]
            done = subprocess.run([*runner, name, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120)
            assert done.returncode == 0 and "example" in done.stdout.lower(), done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_launch_of_the_readme_gives_the_losses_of_the_first_run(elsewhere):
    """As the README says of the pair: fp32, 20 steps, one process and two ranks."""
    (launch,) = [c for c in commands("README.md") if c[0] == "launch/torchrun.sh"]
    (first,) = [c for c in commands("README.md") if c[:2] == ["scale", "train"] and "name=first" in c]
    for command in ([sys.executable, "-m", "scale.cli.main", *first[1:]], ["bash", str(ROOT / launch[0]), *launch[1:]]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=1500)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert "completed: step 20 of 20" in done.stdout
    one, two = (
        [row["loss"] for row in metrics_of(elsewhere / "runs" / name) if row["step"]] for name in ("first", "two")
    )
    assert len(one) == 20 and two == pytest.approx(one, rel=1e-5)


def test_the_demo_does_what_its_target_says():
    """`make demo` itself installs; its verbs run above with fewer steps. Here: it ends with the check of the export."""
    plan = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True).stdout
    assert plan.index("scale train configs/demo.yaml") < plan.index("scale export") < plan.index("check_export.py")


@pytest.mark.timeout(500)
@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")])
def test_python_examples_run(page, elsewhere):
    script = elsewhere / "example.py"
    script.write_text("\n".join(blocks(page, "python")))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-1000:]


def test_the_yaml_of_the_readme_is_a_config(elsewhere):
    from scale.config import load_config

    (block,) = blocks("README.md", "yaml")
    (elsewhere / "mine.yaml").write_text(block)
    config = load_config(elsewhere / "mine.yaml")
    assert [s.kind for s in config.data.sources] == ["text", "jsonl"] and config.model.preset == "tiny"
    assert yaml.safe_load(block)["extends"] == "configs/demo.yaml"


@pytest.mark.parametrize("verb", [["train"], ["doctor"], ["plot"], ["generate"], ["export"],
                                  *(["data", v] for v in ("tokenize", "validate", "clean", "split", "inspect"))])  # fmt: skip
def test_every_help_has_an_example_whose_arguments_parse(verb, capsys):
    from scale.cli.main import make_parser

    with pytest.raises(SystemExit):
        main([*verb, "--help"])
    text = capsys.readouterr().out
    example = re.search(r"examples?:\s*(scale .*)", text)
    assert example, f"no example in scale {' '.join(verb)} --help"
    make_parser().parse_args(shlex.split(example[1])[1:])


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), f"{page}: {target}"


def test_the_speed_table_shows_what_the_csv_shows():
    with (ROOT / "benchmarks" / "results" / "train_step.csv").open() as file:
        rows = list(csv.DictReader(file))
    shown = [line for line in (ROOT / "README.md").read_text().splitlines() if re.match(r"\| \d+ \|", line)]
    assert len(shown) == len(rows)
    for line, row in zip(shown, rows, strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        speed = f"{float(row['median']):,.0f} ({float(row['q20']):,.0f}..{float(row['q80']):,.0f})"
        ratio = f"{float(row['ratio']):.3f} ({float(row['ratio_q20']):.3f}..{float(row['ratio_q80']):.3f})"
        assert [cells[0], *cells[2:]] == [row["x"], speed, ratio]
