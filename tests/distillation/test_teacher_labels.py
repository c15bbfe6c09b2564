"""What the teacher says of pictures is what is written, and what the real reader reads."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distillation.folder_worlds import ABSENT, CONFIDENCE, PHRASES, write_world
from PIL import Image, ImageOps

from efficientsam3_hf import EfficientSam3Model, EfficientSam3Processor
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.masks_rle import decode_rle
from efficientsam3_hf.data.own_folder import OwnImages
from efficientsam3_hf.data.saco import SacoImages
from efficientsam3_hf.distillation.teacher import Teacher, load_teacher
from efficientsam3_hf.distillation.teacher_labels import ABSENT as IS_ABSENT
from efficientsam3_hf.distillation.teacher_labels import (
    DOUBTFUL,
    PRESENT,
    FoundInstance,
    LabelFolder,
    Labeller,
    PhraseLabel,
    PictureLabels,
    write_part,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return write_world(tmp_path_factory.mktemp("labels"))


@pytest.fixture(scope="module")
def teacher(world) -> Teacher:
    return load_teacher(world / "teacher", "float32")


@pytest.fixture(scope="module")
def labelled(world, teacher, tmp_path_factory) -> dict[str, PictureLabels]:
    """Labels of all pictures, as they are on disk."""
    pictures = OwnImages(str(world / "photos"), PHRASES)
    folder = LabelFolder(tmp_path_factory.mktemp("kept"), pictures)
    labeller = Labeller(teacher, PHRASES, CONFIDENCE, ABSENT, prompts_at_once=2)
    names = [name for name, _ in pictures.records()]
    for name in names:
        folder.label(name, labeller)
    found = {name: folder.labelled(name) for name in names}
    return {name: labels for name, labels in found.items() if labels is not None}


def answers(model, processor, picture: Image.Image, phrase: str) -> tuple[np.ndarray, list]:
    """Scores of all queries, and of those above the threshold score, box and mask: by hand."""
    with torch.no_grad():
        outputs = model(**processor(images=picture, text=phrase, return_tensors="pt"))
    scores = (outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid())[0]
    size = (picture.height, picture.width)
    masks = torch.nn.functional.interpolate(outputs.pred_masks, size, mode="bilinear")[0] > 0
    boxes = outputs.pred_boxes[0] * torch.tensor([*size[::-1], *size[::-1]])
    kept = [
        (float(scores[index]), boxes[index].clamp(0, size[0]).numpy(), masks[index].numpy())
        for index in scores.argsort(descending=True).tolist()
        if scores[index] > CONFIDENCE and masks[index].any()
    ]
    return scores.numpy(), kept


def test_labels_are_what_the_teacher_says_by_itself(world, labelled):
    own = EfficientSam3Model.from_pretrained(world / "teacher").eval()
    own_processor = EfficientSam3Processor.from_pretrained(world / "teacher")
    verdicts = set()
    for name in ("0/9.png", "1/1.png", "2/2.png"):
        picture = Image.open(world / "photos" / name).convert("RGB")
        for label in labelled[name].phrases:
            scores, kept = answers(own, own_processor, picture, label.phrase)
            mirror = ImageOps.mirror(picture)
            mirrored, _ = answers(own, own_processor, mirror, label.phrase)

            verdicts.add(label.verdict)
            assert label.score == pytest.approx(scores.max(), abs=1e-5)
            assert len(label.instances) == len(kept)
            for found, (score, box, mask) in zip(label.instances, kept, strict=True):
                assert found.score == pytest.approx(score, abs=1e-5)
                np.testing.assert_allclose(found.box_xyxy, box, atol=1e-2)
                assert (decode_rle(found.rle) != mask).mean() < 1e-3
            highest = scores.max(), mirrored.max()
            if kept:
                assert label.verdict == PRESENT
            elif max(highest) <= ABSENT:
                assert label.verdict == IS_ABSENT
            else:
                assert label.verdict == DOUBTFUL
            if label.mirror_score is not None:
                assert highest[0] <= ABSENT
                assert label.mirror_score == pytest.approx(highest[1], abs=1e-5)
    assert verdicts == {PRESENT, IS_ABSENT, DOUBTFUL}


def test_what_only_the_mirror_image_shows_is_doubtful(labelled):
    of_mirrors = [
        label
        for labels in labelled.values()
        for label in labels.phrases
        if label.mirror_score is not None and label.mirror_score > ABSENT
    ]

    assert of_mirrors  # or this would show nothing
    assert all(label.verdict == DOUBTFUL and label.score <= ABSENT for label in of_mirrors)


def test_the_real_reader_reads_them(world, labelled, tmp_path):
    summary = write_part(labelled.values(), tmp_path / "train.json")
    samples = load(
        SacoImages(str(tmp_path / "train.json"), str(world / "photos"), upright=True),
        on_error="raise",
    )

    read = {sample.file_name: sample for sample in samples}
    assert summary["broken"].keys() == {"broken.jpg"}
    assert len(read) == summary["pictures"] == 12 - summary["left out"]
    counts = dict.fromkeys((PRESENT, IS_ABSENT, DOUBTFUL), 0)
    for name, labels in labelled.items():
        for label in labels.phrases:
            counts[label.verdict] += 1
        if name not in read:
            assert not labels.is_usable
            continue
        for query, label in zip(read[name].queries, labels.phrases, strict=True):
            assert query.phrase == label.phrase
            assert query.is_negative == (label.verdict == IS_ABSENT)
            assert bool(query.instances) == (label.verdict == PRESENT)
            assert query.is_exhaustive == (label.verdict != DOUBTFUL and label.is_exhaustive)
            for instance, found in zip(query.instances or [], label.instances, strict=True):
                assert instance.rle == found.rle
                assert instance.details["score"] == pytest.approx(found.score, abs=1e-6)
                np.testing.assert_allclose(instance.box_xyxy, found.box_xyxy, atol=1e-6)
    assert counts == {verdict: summary[verdict] for verdict in counts}


def test_a_weaker_detection_of_something_else_leaves_the_phrase_open(teacher):
    labeller = Labeller(teacher, ["dog"], confidence=0.5, absent=0.1)
    masks = torch.zeros(3, 8, 8, dtype=torch.bool)
    masks[0, :4], masks[1, :5], masks[2, 6:] = True, True, True
    found = {"scores": torch.tensor([0.9, 0.3, 0.3]), "masks": masks, "boxes": torch.ones(3, 4)}

    def first(count: int) -> dict[str, torch.Tensor]:
        return {name: values[:count] for name, values in found.items()}

    assert labeller.sort_out(first(2), (8, 8))[1] == 0  # the second is the first again
    instances, doubts = labeller.sort_out(found, (8, 8))
    assert len(instances) == 1
    assert doubts == 1
    label = PhraseLabel("dog", PRESENT, 0.9, None, instances, is_exhaustive=False)
    (query,) = PictureLabels("a.png", [], [8, 8], [label]).sample().queries
    assert len(query.instances or []) == 1
    assert not query.is_exhaustive


def test_pictures_with_nothing_but_doubt_are_left_out_and_counted(tmp_path):
    sure = PhraseLabel("dog", IS_ABSENT, 0.0)
    doubt = PhraseLabel("cat", DOUBTFUL, 0.3)
    labels = [
        PictureLabels("a.png", [], [4, 5], [sure, doubt]),
        PictureLabels("b.png", [], [4, 5], [doubt]),
        PictureLabels("c.png", [], error="OSError: cut short"),
    ]

    summary = write_part(labels, tmp_path / "part.json")
    alone = write_part(labels[1:], tmp_path / "alone.json")

    pairs = json.loads((tmp_path / "part.json").read_text())["images"]
    assert [(pair["file_name"], pair["text_input"]) for pair in pairs] == [
        ("a.png", "dog"),
        ("a.png", "cat"),
    ]
    assert [pair["is_instance_exhaustive"] for pair in pairs] == [1, 0]
    assert (summary["left out"], summary[DOUBTFUL], summary["broken"]) == (
        1,
        2,
        {"c.png": "OSError: cut short"},
    )
    assert alone["pictures"] == 0
    assert not (tmp_path / "alone.json").exists()


def test_labels_are_made_anew_for_other_pixels_and_other_phrases(world, teacher, tmp_path):
    photo = tmp_path / "photos" / "a.png"
    photo.parent.mkdir()
    Image.open(world / "photos/0/0.png").save(photo)
    labeller = Labeller(teacher, PHRASES, CONFIDENCE, ABSENT)
    folder = LabelFolder(tmp_path / "labels", OwnImages(str(photo.parent), PHRASES[:2]))
    other = LabelFolder(tmp_path / "labels", OwnImages(str(photo.parent), PHRASES[1:]))
    folder.label("a.png", labeller)

    assert folder.labelled("a.png") is not None
    assert other.labelled("a.png") is None
    Image.open(world / "photos/0/3.png").save(photo)
    assert folder.labelled("a.png") is None


def test_photographs_are_labelled_and_read_upright(world, teacher, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    scene = Image.open(world / "photos/0/0.png").convert("RGB").crop((0, 0, 112, 80))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    scene.transpose(Image.Transpose.ROTATE_90).save(folder / "turned.jpg", exif=exif, quality=95)
    pictures = OwnImages(str(folder), PHRASES)
    labels = LabelFolder(tmp_path / "labels", pictures)
    label = labels.label("turned.jpg", Labeller(teacher, PHRASES, CONFIDENCE, ABSENT))

    write_part([label], tmp_path / "part.json")
    (read,) = load(SacoImages(str(tmp_path / "part.json"), str(folder), upright=True))
    lying = load(SacoImages(str(tmp_path / "part.json"), str(folder)), on_error="raise")

    assert label.size == [80, 112]
    assert read.size == read.image.shape[:2] == (80, 112)
    assert np.abs(read.image.astype(int) - np.asarray(scene).astype(int)).mean() < 10
    with pytest.raises(ValueError, match=r"has \(112, 80\) pixels"):
        lying[0]


def test_a_box_reaches_no_further_than_the_picture(teacher):
    labeller = Labeller(teacher, ["dog"])
    found = {
        "scores": torch.tensor([0.9]),
        "masks": torch.ones(1, 8, 8, dtype=torch.bool),
        "boxes": torch.tensor([[-3.0, 2.0, 12.0, 2.0]]),
    }

    (instance,), _ = labeller.sort_out(found, (8, 8))

    assert instance == FoundInstance([0.0, 2.0, 8.0, 3.0], instance.rle, pytest.approx(0.9))
