"""`efficientsam3 cache-teacher`."""

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from sam3_teachers import tiny_sam3_video, write_pictures

from efficientsam3_hf.data.files import write_image
from efficientsam3_hf.data.synthetic import Clips
from efficientsam3_hf.distillation.cache_command import CacheArguments, main, run
from efficientsam3_hf.distillation.cache_files import DiskFullError
from efficientsam3_hf.distillation.teacher_cache import TeacherCache

SMALL = {"num_workers": 0, "device": "cpu"}
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """A teacher, pictures and videos."""
    folder = tmp_path_factory.mktemp("command")
    tiny_sam3_video().save_pretrained(folder / "teacher")
    write_pictures(folder / "photos", 5)
    for index, frame in enumerate(Clips(1, num_frames=4, side=112)[0].frames or []):
        write_image(folder / f"videos/0/{index:03d}.png", frame)
    return folder


def arguments(folders: Path, output: Path, **changes) -> CacheArguments:
    return CacheArguments(
        images=str(folders / "photos"),
        output=str(output),
        teacher=str(folders / "teacher"),
        **{**SMALL, **changes},
    )


def test_a_folder_of_pictures_becomes_a_cache(folders, tmp_path, capsys):
    report = run(arguments(folders, tmp_path / "cache", codec="pca", rank=8, verify=True))

    assert report.cache is not None
    assert len(report.cache) == 5
    output = capsys.readouterr().out
    assert "5 pictures of 5 samples" in output
    assert "| trunk | pca |" in output
    assert TeacherCache.open(tmp_path / "cache").manifest.teacher["dtype"] == "bfloat16"


def test_a_folder_of_videos_becomes_a_cache_of_frames(folders, tmp_path):
    options = {"kind": "clip", "frames": 3}
    options["images"] = str(folders / "videos")

    report = run(
        CacheArguments(
            output=str(tmp_path / "cache"), teacher=str(folders / "teacher"), **SMALL, **options
        )
    )

    assert report.cache is not None
    assert sorted(report.cache) == ["own/0#0", "own/0#1", "own/0#2"]


def test_a_plan_writes_no_shards(folders, tmp_path):
    report = run(arguments(folders, tmp_path / "cache", plan_only=True))

    assert report.cache is None
    assert report.plan.shards_to_write == 1
    assert not (tmp_path / "cache/shards").exists()


def test_what_cannot_fit_is_not_begun(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(1000, 0, 1000))

    with pytest.raises(DiskFullError, match=r"takes 0\.00 GB more, and 0\.00 GB are free"):
        run(arguments(folders, tmp_path / "cache"))
    assert not (tmp_path / "cache/shards").exists()


def test_flags_and_files_say_the_same(folders, tmp_path):
    config = tmp_path / "cache.yaml"
    config.write_text(
        f"images: {folders / 'photos'}\noutput: {tmp_path / 'cache'}\n"
        f"teacher: {folders / 'teacher'}\ncodec: fp16\nfraction: null\nflips: true\n"
        "device: cpu\nnum_workers: 0\n"
    )

    main(["--config", str(config), "--codec", "int8"])

    manifest = TeacherCache.open(tmp_path / "cache").manifest
    assert manifest.codec["name"] == "int8"
    assert manifest.flips
    with pytest.raises(ValueError, match="--codek"):
        main(["--config", str(config), "--codek", "int8"])
    config.write_text(config.read_text() + "codek: int8\n")
    with pytest.raises(ValueError, match="--codek"):
        main(["--config", str(config)])


def test_what_is_made_anew_is_not_cached(folders, tmp_path):
    with pytest.raises(ValueError, match="'synthetic' are made anew"):
        run(arguments(folders, tmp_path / "cache", format="synthetic"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": ""}, "--images is missing: the folder of the pictures or videos"),
        ({"output": ""}, "--output is missing: the folder of the cache"),
        ({"format": "cocoa"}, "'cocoa' is no format of pictures. Did you mean 'coco'"),
        ({"kind": "neck"}, "--kind is one of trunk, levels"),
        ({"kind": "clip", "format": "sa1b"}, "'sa1b' is no format of clips"),
        ({"format": "davis"}, "'davis' is no format of pictures"),
    ],
)
def test_arguments_that_mean_nothing_are_errors(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        CacheArguments(**{"images": "photos", "output": "cache", **changes})


def test_the_trunk_is_compiled_if_asked(folders, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))

    run(arguments(folders, tmp_path / "cache", compile=True, plan_only=True))

    assert [type(each).__name__ for each in compiled] == ["Sam3ViTModel"]
