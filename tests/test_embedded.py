"""The model that comes with the package: there, small, loaded by whatever names no model."""

import json
import logging
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline

from efficientsam3_hf import (
    EfficientSam3Model,
    EfficientSam3Processor,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerProcessor,
    EfficientSam3VideoModel,
    zoo,
)

TASK = "promptable-concept-segmentation"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "red.png"
    pixels = np.full((60, 90, 3), 90, dtype=np.uint8)
    pixels[10:40, 20:50] = (205, 30, 35)
    Image.fromarray(pixels).save(path)
    return path


def test_the_folder_is_small_and_needs_no_code_of_its_own():
    files = {path.name: path.stat().st_size for path in zoo.embedded().iterdir()}

    assert sum(files.values()) <= 8_000_000
    assert not [name for name in files if name.endswith(".py")]
    assert all("auto_map" not in path.read_text() for path in zoo.embedded().glob("*.json"))


def test_every_class_loads_its_part_in_single_precision(picture):
    folder = zoo.embedded()
    with Image.open(picture) as file:
        image = file.convert("RGB")

    model = AutoModel.from_pretrained(folder)
    processor = AutoProcessor.from_pretrained(folder)
    tracker = EfficientSam3TrackerModel.from_pretrained(folder)
    video = EfficientSam3VideoModel.from_pretrained(folder)

    assert isinstance(model, EfficientSam3Model)
    assert isinstance(processor, EfficientSam3Processor)
    assert {each.dtype for each in (model, tracker, video)} == {torch.float32}
    with torch.no_grad():
        outputs = model.eval()(**processor(images=image, text="red square"))
        inputs = EfficientSam3TrackerProcessor.from_pretrained(folder)(
            image, input_boxes=[[[20, 10, 50, 40]]]
        )
        masks = tracker.eval()(**inputs).pred_masks
    assert outputs.pred_masks.isfinite().all()
    assert masks.isfinite().all()


def test_it_says_which_words_it_does_not_know(caplog, package_log):
    processor = EfficientSam3Processor.from_pretrained(zoo.embedded())

    processor(text=["Red circle", "a dog", "purple dog"])

    (record,) = caplog.records
    assert record.message.startswith("This model does not know 'a', 'dog'. All the words it knows")
    assert "circle" in record.message
    assert "<|" not in record.message
    assert "visual" not in record.message


def test_nothing_is_said_of_words_that_are_known(caplog, package_log):
    EfficientSam3Processor.from_pretrained(zoo.embedded())(text=["Red  circle", "star", "visual"])
    zoo.processor("efficientsam3-tinyvit-s")(text=["a dog", "!?"])

    assert not caplog.records


def test_a_pipeline_without_a_model_takes_it_and_says_so(picture, caplog, package_log, tmp_path):
    with caplog.at_level(logging.WARNING, "efficientsam3_hf"):
        pipe = pipeline(TASK)

    said = [record.message for record in caplog.records if record.name == "efficientsam3_hf.auto"]
    assert len(said) == 1
    assert "the miniature that comes with the package" in said[0]
    assert "model=..." in said[0]
    assert all(found["label"] == "red square" for found in pipe(str(picture), text="red square"))
    pipe.save_pretrained(tmp_path / "saved")
    assert str(ROOT) not in (tmp_path / "saved" / "config.json").read_text()


def test_a_pipeline_with_a_model_does_not_speak_of_it(caplog, package_log):
    pipeline(TASK, model=str(zoo.embedded()))

    assert not [record for record in caplog.records if record.name == "efficientsam3_hf.auto"]


@pytest.mark.parametrize(
    "imports",
    [
        "import efficientsam3_hf; from transformers.pipelines import check_task",
        "from transformers.pipelines import check_task; import efficientsam3_hf",
        "import efficientsam3_hf.pipelines; from transformers.pipelines import check_task",
    ],
)
def test_the_default_is_there_in_whatever_order_things_are_imported(imports):
    code = f"{imports}; print(check_task({TASK!r})[1]['default']['model'][0])"

    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)

    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == str(zoo.embedded())


def test_packages_carry_it():
    resources = files("efficientsam3_hf") / "assets" / zoo.embedded().name

    assert {each.name for each in resources.iterdir()} == {
        *("README.md", "config.json", "model.safetensors", "processor_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    # A wheel holds what git does not ignore.
    paths = [str(path) for path in zoo.embedded().iterdir()]
    ran = subprocess.run(["git", "check-ignore", "-v", *paths], cwd=ROOT, capture_output=True)
    assert ran.stdout == b""


def test_its_card_says_what_it_is_and_how_to_load_a_real_one():
    card = (zoo.embedded() / "README.md").read_text()

    assert "knows only its own little world" in card
    assert "--model path/to/" in card
    config = json.loads((zoo.embedded() / "config.json").read_text())
    assert all(word in card for word in config["words"] if word != "visual")
