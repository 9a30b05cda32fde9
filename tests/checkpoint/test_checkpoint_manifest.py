"""Any flipped byte of any file, and any file too many or too few, is found before a pickle is opened."""

import enum
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING

from scale.checkpoint.manifest import MANIFEST, DamagedCheckpoint, Manifest, TensorEntry, entry_of, read_manifest
from scale.checkpoint.saved import Saved, _RecordUnpickler, saved_in
from scale.checkpoint.store import Checkpoints

TENSORS = {"model/w": torch.arange(12, dtype=torch.float32).view(3, 4), "optim/w/step": torch.tensor(7)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = Checkpoints(tmp_path_factory.mktemp("store"), 1, 0)
    store.save(100, TENSORS, {"loader": [1, 2.5]}, val_loss=3.25)
    store.wait()
    return store.saved()[0].path


def test_manifest_tells_what_is_in_the_folder(whole: Path) -> None:
    manifest = read_manifest(whole)
    assert (manifest.step, manifest.val_loss) == (100, 3.25)
    assert set(manifest.files) == {p.name for p in whole.iterdir()} - {MANIFEST} >= {"state.json", ".metadata"}
    assert manifest.tensors["model/w"].shape == [3, 4] and manifest.tensors["model/w"].dtype == "float32"
    assert manifest.tensors["optim/w/step"].shape == [] and manifest.tensors["optim/w/step"].dtype == "int64"
    assert manifest.files["state.json"].bytes == (whole / "state.json").stat().st_size


@given(name=st.sampled_from(["__0_0.distcp", ".metadata", "state.json", MANIFEST]), data=st.data())
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_flipped_byte_is_found(whole: Path, name: str, data: st.DataObject) -> None:
    good = (whole / name).read_bytes()
    offset = data.draw(st.integers(0, len(good) - 1))
    mask = data.draw(st.integers(1, 255))
    bad = bytearray(good)
    bad[offset] ^= mask
    try:
        (whole / name).write_bytes(bad)
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            Saved(whole, 100, None).verify()
    finally:
        (whole / name).write_bytes(good)
    Saved(whole, 100, None).verify()


def test_every_byte_of_the_manifest_counts(whole: Path) -> None:
    good = (whole / MANIFEST).read_bytes()
    try:
        for offset in range(len(good)):
            # 0x01 turns digits into digits, 0x20 changes case, 0x10 turns a space into a control character
            for mask in (0x01, 0x10, 0x20):
                bad = bytearray(good)
                bad[offset] ^= mask
                (whole / MANIFEST).write_bytes(bad)
                with pytest.raises(DamagedCheckpoint, match=MANIFEST):
                    read_manifest(whole)
    finally:
        (whole / MANIFEST).write_bytes(good)


@pytest.mark.parametrize("tail", [b"\n", b" ", b"\0", b"{}"])
def test_appended_bytes_are_found(whole: Path, tmp_path: Path, tail: bytes) -> None:
    for name in [p.name for p in whole.iterdir()]:
        copy = Path(shutil.copytree(whole, tmp_path / name / whole.name))
        with (copy / name).open("ab") as handle:
            handle.write(tail)
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            Saved(copy, 100, None).verify()


def test_missing_extra_and_linked_files_are_found(whole: Path, tmp_path: Path) -> None:
    for name in [p.name for p in whole.iterdir()]:
        copy = Path(shutil.copytree(whole, tmp_path / name / whole.name))
        (copy / name).rename(tmp_path / "elsewhere")
        with pytest.raises(DamagedCheckpoint, match=name.replace(".", r"\.")):
            Saved(copy, 100, None).verify()
        (copy / name).symlink_to(tmp_path / "elsewhere")
        if name != MANIFEST:
            with pytest.raises(DamagedCheckpoint, match="not a regular file"):
                Saved(copy, 100, None).verify()
        (copy / name).unlink()
        (tmp_path / "elsewhere").rename(copy / name)
        Saved(copy, 100, None).verify()
        (copy / ".hidden").mkdir()
        with pytest.raises(DamagedCheckpoint, match=r"\.hidden: is not in the manifest"):
            Saved(copy, 100, None).verify()


def test_a_whole_folder_under_another_steps_name_is_damage(whole: Path, tmp_path: Path) -> None:
    shutil.copytree(whole, tmp_path / "step_00000200")
    with pytest.raises(DamagedCheckpoint, match="holds step 100"):
        saved_in(tmp_path)[0].verify()


def test_another_format_is_refused_with_its_number(tmp_path: Path) -> None:
    Manifest(1, None, "2026-01-01T00:00:00+00:00", {}, {}, format=2).write(tmp_path)
    with pytest.raises(DamagedCheckpoint, match="format 2 is not 1"):
        read_manifest(tmp_path)


def test_nothing_is_opened_before_the_hash_matched(whole: Path, tmp_path: Path) -> None:
    """A pickle that leaves a trace when loaded stands in for `.metadata`; its hash does not match."""
    copy = Path(shutil.copytree(whole, tmp_path / whole.name))
    trace = tmp_path / "trace"
    (copy / ".metadata").write_bytes(pickle.dumps(_Touch(trace)))
    for use in (lambda s: s.state(), lambda s: s.shapes(), lambda s: s.read({"model/w": torch.zeros(3, 4)})):
        with pytest.raises(DamagedCheckpoint, match="metadata"):
            use(Saved(copy, 100, None))
    assert not trace.exists()


def describe(folder: Path) -> None:
    entries = {k: TensorEntry(list(t.shape), str(t.dtype).removeprefix("torch.")) for k, t in TENSORS.items()}
    Manifest.describe(100, None, entries, {p.name: entry_of(p) for p in folder.iterdir()}).write(folder)


def test_a_forged_pickle_cannot_name_other_code(whole: Path, tmp_path: Path) -> None:
    """Here the forger has also written a matching manifest."""
    copy = Path(shutil.copytree(whole, tmp_path / whole.name))
    trace = tmp_path / "trace"
    (copy / ".metadata").write_bytes(pickle.dumps(_Touch(trace)))
    (copy / MANIFEST).unlink()
    describe(copy)
    saved = Saved(copy, 100, None)
    saved.verify()
    with pytest.raises(Exception, match=r"names pathlib\.Path\.touch|names .*touch|no checkpoint needs"):
        saved.read({"model/w": torch.zeros(3, 4)})
    assert not trace.exists()


class _As3112(pickle.Pickler):
    """Writes enum members as Python 3.11.2 does."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, enum.Enum) else NotImplemented


def test_a_checkpoint_written_by_python_3_11_2_can_be_read(whole: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(whole, tmp_path / whole.name))
    metadata = pickle.loads((copy / ".metadata").read_bytes())
    with (copy / ".metadata").open("wb") as handle:
        _As3112(handle, protocol=4).dump(metadata)
    assert b"getattr" in (copy / ".metadata").read_bytes()
    (copy / MANIFEST).unlink()
    describe(copy)
    w = torch.zeros(3, 4)
    Saved(copy, 100, None).read({"model/w": w})
    assert torch.equal(w, TENSORS["model/w"])


class _Get:
    def __init__(self, *arguments: Any):
        self.arguments = arguments

    def __reduce__(self) -> tuple:
        return getattr, self.arguments


def test_getattr_in_a_pickle_reaches_the_members_of_one_enum_and_nothing_else() -> None:
    def load(*arguments: Any) -> Any:
        return _RecordUnpickler(io.BytesIO(pickle.dumps(_Get(*arguments)))).load()

    formats = _MEM_FORMAT_ENCODING
    assert load(formats, "TORCH_CHANNELS_LAST") is formats.TORCH_CHANNELS_LAST
    for owner, name in [
        (torch.Size, "__class__"),
        (formats, "__class__"),
        (formats, "mro"),
        (formats, 1),
        ("", "join"),
    ]:
        with pytest.raises(pickle.UnpicklingError, match="no checkpoint needs"):
            load(owner, name)


class _Touch:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_manifest_is_plain_sorted_json(whole: Path) -> None:
    body = json.loads((whole / MANIFEST).read_text())
    assert list(body) == sorted(body) and body["format"] == 1 and len(body["sha256"]) == 64
