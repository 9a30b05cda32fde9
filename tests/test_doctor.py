"""`scale doctor` on machines that are broken in one way each."""

from __future__ import annotations

import builtins
import ctypes
import os
import re
import shutil
import subprocess
import sys
from collections import namedtuple
from email.message import Message
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

from scale import doctor, packages
from scale.errors import EXIT_FAILED, EXIT_OK

ROOT = Path(__file__).parents[1]
REQUIRES = {
    "scale-trainer": [
        "torch>=2.11",
        "rich>=14",
        'colorama; sys_platform == "nowhere"',
        'fast-kernels>=3; extra == "kernels"',
        'wrapper[gpu]>=1; extra == "fp8"',
        'scale-trainer[kernels]; extra == "dev"',
    ],
    "wrapper": ['wrapper-gpu>=2; extra == "gpu"', 'unwanted; extra == "docs"'],
}
GOOD = {
    "scale-trainer": "0.1.0",
    "torch": "2.13.0+cpu",
    "rich": "15.0",
    "fast-kernels": "3.1",
    "wrapper": "1.0",
    "wrapper-gpu": "2.5",
}


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Installed distributions of a made-up machine; tests change it."""
    here = dict(GOOD)

    def version(name: str) -> str:
        if name not in here:
            raise metadata.PackageNotFoundError(name)
        return here[name]

    about = Message()
    about["Requires-Python"] = ">=3.11"
    for extra in ("kernels", "fp8", "dev"):
        about["Provides-Extra"] = extra
    monkeypatch.setattr(packages, "source_tree", lambda: None)  # as if installed from a wheel
    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "requires", lambda name: REQUIRES.get(name))
    monkeypatch.setattr(metadata, "metadata", lambda name: about)
    return here


def test_a_good_machine(versions: dict[str, str]) -> None:
    assert doctor.package_problems() == []
    assert doctor.extras() == (["kernels", "fp8"], [])
    assert doctor.installed()[1:] == [
        ("scale-trainer", "0.1.0", ""),
        ("torch", "2.13.0+cpu", ">=2.11"),
        ("rich", "15.0", ">=14"),
    ]


def test_outdated_and_missing_requirements(versions: dict[str, str]) -> None:
    versions["torch"] = "2.1.0+cu118"
    del versions["rich"]
    assert doctor.package_problems() == [
        "torch 2.1.0+cu118 is installed, but >=2.11 is needed: pip install 'torch>=2.11'",
        "rich is not installed: pip install 'rich>=14'",
    ]


def test_a_missing_extra_is_no_problem_but_an_outdated_one_is(versions: dict[str, str]) -> None:
    del versions["fast-kernels"]
    assert doctor.extras() == (["fp8"], ["kernels"])
    assert doctor.package_problems() == []
    versions["fast-kernels"] = "2.9"
    assert doctor.extras() == (["fp8"], ["kernels"])
    assert doctor.package_problems() == [
        "fast-kernels 2.9 is installed, but >=3 is needed for the extra kernels: pip install 'scale-trainer[kernels]'"
    ]


def test_extras_of_a_requirement_are_followed(versions: dict[str, str]) -> None:
    versions["wrapper-gpu"] = "1.9"
    assert doctor.extras() == (["kernels"], ["fp8"]) and "wrapper-gpu 1.9" in doctor.package_problems()[0]
    del versions["wrapper-gpu"]
    assert doctor.extras() == (["kernels"], ["fp8"]) and doctor.package_problems() == []
    assert [str(u) for u in packages.unmet(Requirement("wrapper"))] == []


def test_not_installed_at_all(versions: dict[str, str]) -> None:
    versions.clear()
    assert [line.split(":")[0] for line in doctor.package_problems()] == ["scale-trainer is not installed"]
    assert doctor.extras() == ([], [])
    assert len(doctor.installed()) == 1


def test_the_real_extras_are_read_from_the_source_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any metadata, as when it runs by PYTHONPATH; from stale ones the extras of another day would be listed."""
    real = metadata.version

    def version(name: str) -> str:
        if name == "scale-trainer":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    monkeypatch.setattr(metadata, "metadata", lambda name: pytest.fail("read"))
    assert {"deepspeed", "kernels", "quant", "dev"} <= set(packages.extra_names())
    assert [r.name for r in packages.requirements("scale-trainer", "quant")] == ["bitsandbytes"]
    assert "bitsandbytes" not in [r.name for r in packages.requirements("scale-trainer")]
    assert {"python", "scale-trainer", "torch"} <= {name for name, _, _ in packages.installed()}
    assert doctor.package_problems() == []
    assert packages.install_line(["quant"]) == f"pip install -e '{ROOT}[quant]'"


def test_every_extra_is_named_by_an_error_that_asks_for_it_and_the_other_way_round() -> None:
    """An extra that nothing reads would be offered for nothing."""
    sources = "".join(path.read_text() for path in (ROOT / "scale").rglob("*.py"))
    asked = set(re.findall(r"MissingExtra\([^)]*\"(\w+)\"\)", sources))
    asked |= set(re.findall(r"MissingExtra\(\s*(?:[^()]|\([^()]*\))*?,\s*\"(\w+)\"", sources))
    backends = {"torchao": "fp8", "te": "te"}  # asked for by variable, in scale/models/fp8.py
    assert set(packages.extra_names()) - {"dev"} == asked | set(backends.values())


@pytest.mark.parametrize(
    ("driver", "built", "gpus", "visible", "said"),
    [
        (None, "13.0", 0, None, None),
        (None, None, 0, None, None),
        ((12, 4), "13.0", 1, None, None),
        ((13, 0), "13.1", 1, "0", None),
        ((12, 4), None, 0, None, "built without CUDA"),
        ((12, 4), "13.0", 0, "0", "supports CUDA 12.4 at most: update the driver, or install torch built for CUDA 12"),
        ((13, 0), "13.1", 0, "", "CUDA_VISIBLE_DEVICES='' leaves no GPU: unset it"),
        ((13, 0), "12.8", 0, None, "torch sees no GPU: see what nvidia-smi says"),
    ],
)
def test_cuda(
    driver: tuple[int, int] | None, built: str | None, gpus: int, visible: str | None, said: str | None
) -> None:
    problems = doctor.cuda_problems(driver, built, gpus, visible)
    assert len(problems) == (said is not None)
    assert said is None or said in problems[0]


class FakeDriver:
    status = 0

    def cuDriverGetVersion(self, pointer: Any) -> int:
        pointer._obj.value = 12040
        return self.status


def test_driver_version(monkeypatch: pytest.MonkeyPatch) -> None:
    here = True
    fake = FakeDriver()
    monkeypatch.setattr(doctor.Path, "exists", lambda path: here and str(path) == "/proc/driver/nvidia/version")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: fake)
    assert doctor.driver_cuda() == (12, 4)
    fake.status = 3
    assert doctor.driver_cuda() is None
    fake.status, here = 0, False
    assert doctor.driver_cuda() is None


def test_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 3 * 10**9))
    assert doctor.folder_problems(tmp_path) == []
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**12, 0, 15 * 10**8))
    assert doctor.folder_problems(tmp_path)[0].startswith(f"{tmp_path}: 1.5 GB of disk are free")


def test_a_folder_nothing_can_be_written_into(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o555)
    folder = closed if os.geteuid() else tmp_path / "gone"  # root may write anywhere that exists
    assert doctor.folder_problems(folder)[0].startswith(f"{folder}: nothing can be written here")


def test_a_kernels_package_hides_another(tmp_path: Path) -> None:
    (tmp_path / "kernels").mkdir()
    assert doctor.kernels_problems([tmp_path]) == []
    (tmp_path / "kernels" / "__init__.py").touch()
    problems = doctor.kernels_problems([tmp_path, tmp_path / "kernels" / ".."])
    assert len(problems) == 1 and problems[0].endswith("delete this file")


def test_tokens_in_config_files(tmp_path: Path) -> None:
    token = "hf_" + "aB3" * 11
    (tmp_path / "configs" / "deep").mkdir(parents=True)
    (tmp_path / "run.yaml").write_text("path: hf_short\nname: a\n")
    (tmp_path / "configs" / "deep" / "run.yml").write_text(f"a: 1\nkey: {token}\n")
    problems = doctor.token_problems(tmp_path)
    assert [p.partition(": ")[0] for p in problems] == ["configs/deep/run.yml:2"]
    assert token not in problems[0]


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without problems whatever it really is."""
    for name in ("package_problems", "folder_problems", "token_problems", "kernels_problems", "torch_problems"):
        monkeypatch.setattr(doctor, name, lambda *_: [])


def test_report(quiet: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.print_report() == EXIT_OK
    out = capsys.readouterr().out
    lines = out.splitlines()
    assert lines[0] == "nothing is wrong"
    for word in ("python", "torch", "transformers", "compute.precision", "compute.recompute"):
        assert word in out
    about = [line for line in lines if line.startswith("extras")]
    listed = [name for line in about for name in line.partition(": ")[2].partition(" (")[0].split(", ")]
    assert sorted(listed) == sorted(name for name in packages.extra_names() if name != "dev")  # each once
    have, lack = packages.extras()
    assert len(about) == bool(have) + bool(lack)
    assert not lack or about[-1].endswith("(only for options that name them: pip install 'scale-trainer[NAME]')")


def test_a_bare_source_tree_is_no_fault() -> None:
    """By PYTHONPATH, with the libraries but without metadata of the framework itself."""
    program = (
        "import sys; from importlib import metadata\n"
        "found = metadata.version\n"
        "def version(name):\n"
        "    if name == 'scale-trainer': raise metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "metadata.version = version\n"
        "from scale.cli.main import main; sys.exit(main(['doctor']))"
    )
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.startswith("nothing is wrong\n") and "torch" in ran.stdout


@pytest.mark.parametrize(
    "name", ["package_problems", "folder_problems", "token_problems", "kernels_problems", "torch_problems"]
)
def test_every_problem_is_one_line_and_exit_code_1(
    name: str, quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    problem = "something is [bold]wrong[/bold] " + "and long " * 30 + "so mend it"
    monkeypatch.setattr(doctor, name, lambda *_: [problem])
    assert doctor.print_report() == EXIT_FAILED
    assert f"wrong: {problem}" in capsys.readouterr().out.splitlines()


def test_a_torch_that_does_not_import(
    quiet: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def broken(name: str, *args: Any) -> Any:
        if name == "scale.hardware":
            raise RuntimeError("libcudart.so.13: cannot open\nmore lines")
        return real(name, *args)

    monkeypatch.delitem(sys.modules, "scale.hardware", raising=False)
    monkeypatch.setattr(builtins, "__import__", broken)
    assert doctor.print_report() == EXIT_FAILED
    out = capsys.readouterr().out
    assert "wrong: torch or transformers cannot be used (libcudart.so.13: cannot open): install them anew" in out


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """An installed package whose import raises what transformer_engine raises where it finds no GPU."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('no GPU')")
    about = folder / f"{name}-{version}.dist-info"
    about.mkdir()
    lines = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", "Provides-Extra: pytorch", *requires]
    (about / "METADATA").write_text("\n".join(lines) + "\n")


def test_packages_that_raise_on_import_are_judged_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    needs = "Requires-Dist: transformer-engine-torch>=2; extra == 'pytorch'"
    distribution(tmp_path, "torchao", "99.0")
    distribution(tmp_path, "transformer_engine", "99.0", needs)
    distribution(tmp_path, "transformer_engine_torch", "1.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    have, lack = doctor.extras()
    assert "te" in lack and "fp8" in have
    assert sum("transformer-engine-torch 1.0 is installed, but >=2" in p for p in doctor.package_problems()) == 1
