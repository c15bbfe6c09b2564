"""Folders appear when they are complete, or not at all."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conversion import folder as folder_module
from conversion.folder import atomic_folder, write_weights

ROOT = Path(__file__).resolve().parents[2]

KILLED_WRITER = """
import os, signal, sys
from conversion.folder import atomic_folder
with atomic_folder(sys.argv[1]) as folder:
    (folder / "model.safetensors").write_bytes(b"half of it")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def contents(path: Path) -> list[str]:
    return sorted(file.name for file in path.iterdir())


def test_a_complete_folder_takes_its_place(tmp_path):
    with atomic_folder(tmp_path / "deep" / "model") as folder:
        (folder / "a").write_text("1")
        assert not (tmp_path / "deep" / "model").exists()

    assert contents(tmp_path / "deep") == ["model"]
    assert contents(tmp_path / "deep" / "model") == ["a"]


def test_an_error_leaves_nothing(tmp_path):
    def fail():
        with atomic_folder(tmp_path / "model") as folder:
            (folder / "a").write_text("1")
            raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk"):
        fail()

    assert contents(tmp_path) == []


def test_a_killed_process_leaves_no_half_written_folder(tmp_path):
    command = [sys.executable, "-c", KILLED_WRITER, str(tmp_path / "model")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}

    process = subprocess.run(command, env=environment, check=False)

    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "model").exists()
    with atomic_folder(tmp_path / "model") as folder:  # and the next writer clears up behind it
        (folder / "a").touch()
    assert contents(tmp_path) == ["model"]


def test_what_is_there_is_kept_unless_told(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()

    with (
        pytest.raises(FileExistsError, match="--overwrite"),
        atomic_folder(tmp_path / "model"),
    ):
        pass
    assert contents(tmp_path / "model") == ["config.json"]

    with atomic_folder(tmp_path / "model", overwrite=True) as folder:
        (folder / "new").touch()
    assert contents(tmp_path) == ["model"]
    assert contents(tmp_path / "model") == ["new"]


def test_only_models_are_replaced(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "birthday.jpg").touch()

    with (
        pytest.raises(FileExistsError, match=r"holds no model.*--overwrite does not replace it"),
        atomic_folder(tmp_path / "photos", overwrite=True),
    ):
        pass

    assert contents(tmp_path / "photos") == ["birthday.jpg"]


def old_model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("old")
    return tmp_path / "model"


def write_new(target: Path) -> None:
    with atomic_folder(target, overwrite=True) as folder:
        (folder / "config.json").write_text("new")


def test_a_folder_stays_if_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    target = old_model(tmp_path)
    replace = Path.replace

    def fail(path, other):
        if ".partial-" in path.name:
            raise OSError("disk went away")
        return replace(path, other)

    monkeypatch.setattr(Path, "replace", fail)

    with pytest.raises(OSError, match="went away"):
        write_new(target)

    assert contents(tmp_path) == ["model"]
    assert (target / "config.json").read_text() == "old"


def test_what_a_killed_process_set_aside_is_put_back(tmp_path):
    target = old_model(tmp_path)
    target.replace(tmp_path / ".model.replaced-x")

    with pytest.raises(FileExistsError, match="not empty"), atomic_folder(target):
        pass
    assert (target / "config.json").read_text() == "old"

    (tmp_path / ".model.replaced-y").mkdir()  # killed behind the last step
    write_new(target)
    assert contents(tmp_path) == ["model"]


def test_a_link_stays_a_link(tmp_path):
    target = old_model(tmp_path)
    (tmp_path / "link").symlink_to(target)

    write_new(tmp_path / "link")

    assert (tmp_path / "link").is_symlink()
    assert (target / "config.json").read_text() == "new"
    assert contents(tmp_path) == ["link", "model"]


def test_an_empty_folder_is_used_and_a_file_is_not(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()

    with atomic_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert contents(tmp_path / "empty") == ["a"]

    with pytest.raises(FileExistsError, match="is a file"), atomic_folder(tmp_path / "file", True):
        pass


def test_weights_are_stored_whatever_their_memory_looks_like(tmp_path):
    matrix = torch.randn(6, 4)
    weights = {"a": matrix, "tied": matrix, "turned": matrix.T, "part": matrix[2:4]}

    (path,) = write_weights(weights, tmp_path)

    torch.testing.assert_close(load_file(path), {k: v.clone() for k, v in weights.items()})
    assert path.stat().st_mode & 0o777 == 0o644


def test_large_weights_are_sharded(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_module, "MAX_SHARD", "1KB")
    weights = {name: torch.randn(200) for name in "abc"}

    paths = write_weights(weights, tmp_path)

    assert len(paths) == 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == weights.keys()
    stored = {name: load_file(tmp_path / file)[name] for name, file in index["weight_map"].items()}
    torch.testing.assert_close(stored, weights)
