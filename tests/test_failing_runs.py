"""Runs and commands that fail on the way: a full or read-only disk, a folder in use, damage; one line, nothing half-written."""

from __future__ import annotations

import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.refusal import Home, Refuse, in_a_process, one_line, status, whole_checkpoints


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return Home(tmp_path_factory.mktemp("home"))


@pytest.fixture
def refuse(home, tmp_path, capsys):
    return Refuse(home, tmp_path, capsys)


@contextmanager
def disk(folder: Path, options: str):
    """A real file system of its own."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)  # lazy: memory maps of a store may still be open


def test_runs_dir_is_a_file(home, refuse, tmp_path):
    (tmp_path / "file").write_text("")
    path = home.write(tmp_path, {"runs_dir": str(tmp_path / "file")})
    refuse("train", path, code=1, fragments=["file/tiny: no run can be written here", "choose another runs_dir"])


@pytest.mark.parametrize("key", ["runs_dir", "data.cache"])
def test_read_only_disk(key, home, refuse, tmp_path):
    with disk(tmp_path / "disk", "ro,size=1m") as folder:
        path = home.write(tmp_path, {key: str(folder)})
        code = 1 if key == "runs_dir" else 2
        refuse("train", path, code=code, fragments=[str(folder), "Read-only file system", "choose another"])
        assert not list(folder.iterdir())
        for words in (["export", home.run], ["data", "tokenize", home.folder / "corpus.jsonl", "--vocab-size", "300"]):
            refuse(
                *words, "--out", folder / "out", fragments=[str(folder / "out"), "Read-only", "choose another place"]
            )


@pytest.mark.parametrize("kilobytes", [32, 48, 64, 96, 160, 256, 384])
def test_full_disk_of_runs(kilobytes, home, refuse, tmp_path):
    """Whatever does not fit any more: the run state, the metrics, the first checkpoint or the second."""
    with disk(tmp_path / "disk", f"size={kilobytes}k") as folder:
        path = home.write(tmp_path, {"runs_dir": str(folder), "train.steps": 30})
        refuse("train", path, code=1, fragments=[str(folder / "tiny"), "No space left on device"], run=folder / "tiny")
        whole_checkpoints(folder / "tiny")


def test_a_disk_that_is_full_before_the_start(home, refuse, tmp_path):
    with disk(tmp_path / "disk", "size=64k") as folder:
        (folder / "others").write_bytes(bytes(64 * 1024))
        path = home.write(tmp_path, {"runs_dir": str(folder)})
        told = f"{folder}/tiny: no run can be written here: No space left on device"
        refuse("train", path, code=1, fragments=[told])


def test_a_full_disk_keeps_the_checkpoint_before(home, refuse, tmp_path):
    with disk(tmp_path / "disk", "size=1m") as folder:
        path = home.write(tmp_path, {"runs_dir": str(folder), "train.steps": 30, "checkpoint.keep_last": 30})
        refuse("train", path, code=1, fragments=[str(folder / "tiny"), "No space left"], run=folder / "tiny")
        steps = whole_checkpoints(folder / "tiny")
        assert 0 < len(steps) < 30
        refuse("generate", folder / "tiny", "--step", "29", fragments=["no checkpoint of step 29", f"{steps[-1]})"])


@pytest.mark.parametrize("kilobytes", [8, 16, 40])
def test_full_disk_of_the_cache(kilobytes, home, refuse, tmp_path):
    with disk(tmp_path / "cache", f"size={kilobytes}k") as folder:
        path = home.write(tmp_path, {"data.cache": str(folder)})
        refuse("train", path, code=1, fragments=[str(folder), "the disk is full; free some space"])


@pytest.mark.parametrize("words", [["export", "RUN"], ["data", "tokenize", "CORPUS", "--vocab-size", "300"]])
@pytest.mark.parametrize("kilobytes", [4, 32])
def test_full_disk_of_a_result(kilobytes, words, home, refuse, tmp_path):
    paths = {"RUN": home.run, "CORPUS": home.folder / "corpus.jsonl"}
    with disk(tmp_path / "disk", f"size={kilobytes}k") as folder:
        out = folder / "out"
        refuse(
            *(paths.get(word, word) for word in words), "--out", out, code=1, fragments=[str(out), "the disk is full"]
        )
        assert not list(folder.iterdir())


HOLD = "import sys, fcntl; f = open(sys.argv[1], 'a+'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"


def test_a_run_folder_in_use(home, refuse, tmp_path):
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    (run / ".lock").write_text("4711")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        refuse(
            "train", home.write(tmp_path, {}), fragments=[str(run), "process 4711 is working", "choose another name"]
        )
    finally:
        holder.communicate()


def copy_of(home: Home, tmp_path: Path, damage) -> Path:
    run = shutil.copytree(home.run, tmp_path / "runs" / "done")
    for checkpoint in (run / "checkpoints").iterdir():
        damage(checkpoint)
    return run


def flip(checkpoint: Path) -> None:
    path = checkpoint / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    "damage", [flip, lambda c: (c / "manifest.json").unlink(), lambda c: (c / "more").write_text("")]
)
def test_all_checkpoints_damaged(damage, home, refuse, tmp_path):
    run = copy_of(home, tmp_path, damage)
    config = home.write(tmp_path, {"name": "done"})
    none_whole = [str(run / "checkpoints"), "none of the 2 checkpoints is whole", "start afresh"]
    for words in (["generate", run], ["export", run, "--out", tmp_path / "out"]):
        refuse(*words, code=1, fragments=none_whole)
    refuse("train", config, "--allow-change", "runs_dir", code=1, fragments=none_whole, run=run)
    assert status(run) == "failed"


def test_a_changed_config(home, refuse):
    refuse(
        "train", home.folder / "run.yaml", "optim.lr=0.5", "name=done",
        fragments=["done/config.yaml:", "optim.lr: 0.003 -> 0.5", "--new, or --allow-change optim.lr"],
    )  # fmt: skip


COMMANDS = [
    (["export", "RUN", "--out", "EXPORT"], ["--out = '", "export': exists already (choose another"]),
    (["export", "HOME", "--out", "OUT"], ["not a run folder (it has no config.yaml)"]),
    (["export", "RUN", "--out", "OUT", "--step", "3"], ["no checkpoint of step 3 (there are: 1, 2)"]),
    (["export", "RUN", "--out", "OUT", "--merge"], ["--merge: this run has no adapter"]),
    (["generate", "RUN", "--step", "7"], ["no checkpoint of step 7 (there are: 1, 2)"]),
    (["generate", "EXPORT", "--step", "1"], ["--step 1:", "is a model folder, which has no steps"]),
    (["generate", "HOME"], ["neither a run folder (config.yaml) nor a model folder (config.json)"]),
    (["generate", "RUN", "--temperature", "-1"], ["--temperature -1: should be 0 (greedy) or more"]),
    (["generate", "RUN", "--temperature", "nan"], ["--temperature nan: should be"]),
    (["generate", "RUN", "--max-new-tokens", "0"], ["--max-new-tokens 0: should be from 1"]),
    (["generate", "RUN", "--seed", str(2**64)], ["--seed 18446744073709551616: should be from 0"]),
    (["generate", "RUN", "--temperature", "hot"], ["--temperature: invalid float value: 'hot'", "generate --help"]),
    (["trian"], ["invalid choice: 'trian'", "'train'", "scale --help"]),
    (["plot", "HOME"], ["metrics.jsonl: there is no such file (give the folder of a run"]),
    (["data", "tokenize", "CORPUS", "--out", "OUT", "--held-out", "1"], ["--held-out 1: a share", "such as 0.01"]),
    (["data", "tokenize", "CORPUS", "--out", "OUT", "--vocab-size", "9"], ["--vocab-size 9: at least 258"]),
    (["data", "tokenize", "CORPUS", "--out", "EXPORT"], ["export: exists already; choose another place"]),
]


@pytest.mark.parametrize(("words", "fragments"), COMMANDS, ids=[" ".join(words) for words, _ in COMMANDS])
def test_command(words, fragments, home, refuse, tmp_path):
    (tmp_path / "home").mkdir()
    places = {"RUN": home.run, "EXPORT": home.export, "HOME": tmp_path / "home", "OUT": tmp_path / "out"}
    places["CORPUS"] = home.folder / "corpus.jsonl"
    refuse(*(places.get(word, word) for word in words), fragments=fragments)


def test_exit_codes_of_the_installed_command(home, tmp_path):
    run = copy_of(home, tmp_path, flip)
    done = in_a_process("export", run, "--out", tmp_path / "out")
    assert done.returncode == 1 and not done.stdout
    one_line(done.stderr, ["none of the 2 checkpoints is whole"])
    assert not (tmp_path / "out").exists()
