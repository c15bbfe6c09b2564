"""Files of weights: every wrapper, and nothing that could harm."""

import os
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import save_file

from conversion.reading import read_weights

WEIGHTS = {"detector.a.weight": torch.arange(6.0).view(2, 3), "detector.b": torch.tensor(7)}


class Bomb:
    """Leaves a file behind when a careless reader unpickles it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    ("content", "wrapper"),
    [
        (WEIGHTS, None),
        ({"model": WEIGHTS}, "model"),
        ({"model": WEIGHTS, "meta": {"step": 3}}, "model"),
        ({"model": WEIGHTS, "optimizer": {"state": {}}, "epoch": 19}, "model"),
        ({"state_dict": WEIGHTS}, "state_dict"),
    ],
)
def test_weights_are_found_in_every_wrapper(tmp_path, content, wrapper):
    torch.save(content, tmp_path / "file.pt")

    file = read_weights(tmp_path / "file.pt")

    torch.testing.assert_close(file.weights, WEIGHTS, rtol=0, atol=0)
    assert file.wrapper == wrapper


def test_safetensors_are_read_too(tmp_path):
    save_file(WEIGHTS, tmp_path / "file.safetensors")

    torch.testing.assert_close(read_weights(tmp_path / "file.safetensors").weights, WEIGHTS)


def test_files_of_old_versions_of_torch_are_read(tmp_path):
    torch.save(WEIGHTS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)

    torch.testing.assert_close(read_weights(tmp_path / "old.pth").weights, WEIGHTS)


def test_shards_of_transformers_are_read_as_one(tmp_path):
    first, second = dict(list(WEIGHTS.items())[:1]), dict(list(WEIGHTS.items())[1:])
    save_file(first, tmp_path / "model-1.safetensors")
    save_file(second, tmp_path / "model-2.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"detector.a.weight": "model-1.safetensors", '
        '"detector.b": "model-2.safetensors"}}'
    )

    file = read_weights(tmp_path)

    torch.testing.assert_close(file.weights, WEIGHTS)
    assert [path.name for path in file.paths] == ["model-1.safetensors", "model-2.safetensors"]


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files_are_called_so(tmp_path, share):
    torch.save({"model": {"a": torch.zeros(10_000)}}, tmp_path / "whole.pt")
    content = (tmp_path / "whole.pt").read_bytes()
    (tmp_path / "part.pt").write_bytes(content[: int(share * len(content))])

    with pytest.raises(ValueError, match="truncated"):
        read_weights(tmp_path / "part.pt")


def test_truncated_safetensors_are_called_so(tmp_path):
    save_file({"a": torch.zeros(1000)}, tmp_path / "whole.safetensors")
    content = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "part.safetensors").write_bytes(content[:-100])

    with pytest.raises(ValueError, match="truncated"):
        read_weights(tmp_path / "part.safetensors")


def test_an_empty_file_is_refused(tmp_path):
    (tmp_path / "empty.pt").touch()

    with pytest.raises(ValueError, match=r"empty\.pt cannot be read"):
        read_weights(tmp_path / "empty.pt")


def test_nothing_in_a_hostile_archive_is_run(tmp_path):
    torch.save({"model": WEIGHTS, "extra": Bomb(tmp_path / "boom")}, tmp_path / "bad.pt")

    with pytest.raises(ValueError, match="nothing of it was run"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "boom").exists()


def test_nothing_in_a_hostile_pickle_is_run(tmp_path):
    (tmp_path / "bad.pt").write_bytes(pickle.dumps({"model": Bomb(tmp_path / "boom")}))

    with pytest.raises(ValueError, match="nothing of it was run"):
        read_weights(tmp_path / "bad.pt")
    assert not (tmp_path / "boom").exists()


def test_an_archive_of_something_else_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "photos.pt", "w") as archive:
        archive.writestr("a.txt", "hello")

    with pytest.raises(ValueError, match="cannot be read"):
        read_weights(tmp_path / "photos.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a list, not a state dict"),
        ({"weights": WEIGHTS}, "weights"),
        ({}, "nothing"),
        ({"model": {"a": torch.zeros(2), "steps": 4}}, "steps"),
        ({"model": WEIGHTS, "state_dict": WEIGHTS}, "'model' and 'state_dict'"),
        ({"model": {1: torch.zeros(2)}}, "1"),
    ],
)
def test_unknown_wrappers_are_named(tmp_path, content, message):
    torch.save(content, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=message):
        read_weights(tmp_path / "file.pt")


def test_paths_that_hold_no_weights_are_refused(tmp_path):
    (tmp_path / "notes.txt").touch()

    with pytest.raises(FileNotFoundError, match="There is no file"):
        read_weights(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"none of \.pt"):
        read_weights(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match=r"no config\.json"):
        read_weights(tmp_path)
