"""`efficientsam3 cache-teacher`."""

import pytest
from sam3_teachers import write_pictures

from efficientsam3_hf.cli.cache_teacher import CodecName, Kind
from efficientsam3_hf.distillation.codecs import CODECS
from efficientsam3_hf.distillation.teacher import KINDS
from efficientsam3_hf.distillation.teacher_cache import TeacherCache

SMALL = ("--workers", 0, "--device", "cpu", "--dtype", "float32")


def test_names_are_those_that_there_are():
    assert [each.value for each in Kind] == list(KINDS)
    assert [each.value for each in CodecName] == list(CODECS)


def test_a_folder_of_pictures_becomes_a_cache(command, sam3, tmp_path):
    write_pictures(tmp_path / "photos", 3)
    words = ["cache-teacher", "--images", tmp_path / "photos", "--teacher", sam3, *SMALL]
    words += ["--output", tmp_path / "cache", "--codec", "fp16", "--flips"]

    planned = command(*words, "--plan-only", "--json")
    written = command(*words, "--verify", "--json")
    read = command(*words)

    assert planned.code == 0, planned.err
    assert planned.json["cache"] is None
    assert (planned.json["plan"]["pictures"], planned.json["plan"]["shards_to_write"]) == (6, 1)
    assert written.code == 0, written.err
    assert written.json["cache"]["pictures"] == 3
    assert written.json["cache"]["errors"]["trunk"]["relative_error"] < 1e-3
    assert "| trunk | fp16 |" in read.out
    assert TeacherCache.open(tmp_path / "cache").manifest.flips


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--images", "nowhere"], "nowhere is no folder"),
        (["--format", "sa1bb"], "'sa1bb' is no format of pictures. Did you mean 'sa1b'?"),
        (["--codec", "jpeg"], "Invalid value for '--codec'"),
    ],
)
def test_what_cannot_be_meant_is_said(changes, message, command, tmp_path):
    words = ["cache-teacher", "--images", tmp_path, "--output", tmp_path / "cache", *SMALL]

    ran = command(*words, *changes)

    assert ran.code == 2
    assert message in " ".join(ran.err.replace("│", " ").split())
