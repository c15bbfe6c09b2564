"""The example that draws what was found."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny import tiny_model

from efficientsam3_hf import zoo
from examples.segment import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    model = tiny_model()
    return zoo.save(model.config, tmp_path_factory.mktemp("model"), model)


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((60, 90, 3), 128, dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize(
    "prompt",
    [
        ["--text", "cat", "--text", "dog"],
        ["--box", "10", "10", "50", "40"],
        ["--text", "cat", "--point", "20", "20"],
    ],
)
def test_an_overlay_is_written_and_findings_are_printed(prompt, folder, picture, capsys):
    code = main([str(picture), "--model", str(folder), "--threshold", "0", *prompt])

    assert code == 0
    printed = capsys.readouterr().out
    assert "5 found" in printed
    with Image.open(picture.with_suffix(".found.png")) as overlay:
        assert overlay.size == (90, 60)
        assert len(overlay.getcolors(10_000) or []) > 3


def test_a_picture_that_cannot_be_read_is_said(folder, tmp_path, capsys):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")

    assert main([str(path), "--model", str(folder), "--text", "cat"]) == 2
    assert "is not a picture that can be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "say what to find"),
        (["--text", "a", "--text", "b", "--box", "1", "2", "3", "4"], "go with one phrase"),
    ],
)
def test_flags_that_make_no_sense_are_said(arguments, message, picture, capsys):
    with pytest.raises(SystemExit):
        main([str(picture), "--model", "anything", *arguments])

    assert message in capsys.readouterr().err
