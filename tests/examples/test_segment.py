"""The example that draws what was found."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model

from efficientsam3_hf import EfficientSam3Model, zoo
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


@pytest.mark.parametrize("kind", ["16 bits", "transparent"])
def test_the_model_sees_and_the_overlay_shows_what_the_picture_shows(
    kind, folder, tmp_path, monkeypatch
):
    path, value = tmp_path / "picture.png", 51
    if kind == "16 bits":
        Image.fromarray(np.full((60, 90), 51 * 257, dtype=np.uint16)).save(path)
    else:
        Image.new("RGBA", (90, 60), (0, 0, 0, 204)).save(path)
    seen = []
    original = EfficientSam3Model.forward

    def forward(self, pixel_values, **inputs):
        seen.append(pixel_values)
        return original(self, pixel_values, **inputs)

    monkeypatch.setattr(EfficientSam3Model, "forward", forward)

    main([str(path), "--model", str(folder), "--text", "cat", "--threshold", "1"])

    torch.testing.assert_close(seen[0], torch.full((1, 3, 112, 112), value / 127.5 - 1))
    with Image.open(path.with_suffix(".found.png")) as overlay:
        assert overlay.getcolors() == [(90 * 60, (value,) * 3)]


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
