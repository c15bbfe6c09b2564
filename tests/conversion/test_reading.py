"""Files of weights: every wrapper, and nothing that could harm."""

import os
import pickle
import random
import warnings
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


STATE = {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 0.1}]}


def test_the_state_of_a_training_is_left_out_for_a_reason(tmp_path):
    content = {"model": WEIGHTS, "optimizer": STATE, "lr_schedulers": [STATE], "epoch": 19}
    torch.save(content, tmp_path / "file.pt")

    file = read_weights(tmp_path / "file.pt")

    assert file.weights.keys() == WEIGHTS.keys()
    assert file.state.keys() == {"optimizer", "lr_schedulers"}
    assert "state of a training" in file.state["optimizer"]


@pytest.mark.parametrize(
    "beside", [{"ema_model": WEIGHTS}, {"detector.c": torch.zeros(2)}, {"nets": [{"a": WEIGHTS}]}]
)
def test_weights_beside_weights_are_refused(tmp_path, beside):
    torch.save({"model": WEIGHTS, **beside}, tmp_path / "file.pt")

    with pytest.raises(
        ValueError, match=f"beside 'model', under {list(beside)}".replace("[", r"\[")
    ):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.zeros(2, device="meta"), "without values, on the meta device"),
        (torch.zeros(2).to(torch.float8_e4m3fn), "as torch.float8_e4m3fn"),
    ],
)
def test_tensors_without_proper_values_are_refused(tmp_path, tensor, message):
    torch.save({"model": {**WEIGHTS, "detector.c": tensor}}, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=f"holds 'detector.c' {message}"):
        read_weights(tmp_path / "file.pt")


@pytest.mark.parametrize("form", ["archive", "legacy", "safetensors"])
def test_damaged_files_are_read_or_refused_and_nothing_else(tmp_path, form):
    path = tmp_path / ("file.safetensors" if form == "safetensors" else "file.pt")
    if form == "safetensors":
        save_file(WEIGHTS, path)
    else:
        torch.save(WEIGHTS, path, _use_new_zipfile_serialization=form == "archive")
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0

    for _ in range(200):
        damaged = bytearray(
            whole[: generator.choice([len(whole), generator.randrange(len(whole))])]
        )
        for _ in range(generator.choice([1, 2, 4]) if damaged else 0):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about what it finds
            try:
                read_weights(path)
            except ValueError:  # whatever else is raised fails this test
                refused += 1

    assert refused > 50


def test_a_folder_with_stale_weights_is_refused(tmp_path):
    save_file(WEIGHTS, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')

    with pytest.raises(ValueError, match="delete what is stale"):
        read_weights(tmp_path)

    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="no index of shards"):
        read_weights(tmp_path)


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
