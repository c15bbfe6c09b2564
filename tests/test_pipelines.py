"""The pipelines: concept segmentation of our own, and two of transformers'."""

import base64
import doctest
import json
import logging
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_tracker
from torch.utils.data import Dataset
from transformers import (
    AutoModelForMaskGeneration,
    AutoModelForZeroShotObjectDetection,
    pipeline,
)

from efficientsam3_hf import PromptableConceptSegmentationPipeline, pipelines, zoo

TASK = "promptable-concept-segmentation"
BOX = [10.0, 10.0, 50.0, 40.0]
OTHER_BOX = [40.0, 20.0, 80.0, 55.0]


def picture(seed: int, width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10, width // 10, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder for all tasks."""
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    return zoo.save(model.config, tmp_path_factory.mktemp("family"), model, tracker)


@pytest.fixture(scope="module")
def pipe(folder) -> PromptableConceptSegmentationPipeline:
    return pipeline(TASK, model=str(folder), device="cpu")


@torch.no_grad()
def expected(pipe, image, threshold: float = 0.0, **prompts) -> list[dict]:
    """What processor and model give when called directly, best first."""
    inputs = pipe.processor(images=image, **prompts)
    found = pipe.processor.post_process_instance_segmentation(
        pipe.model(**inputs), threshold=threshold, target_sizes=inputs["original_sizes"]
    )
    text = prompts.get("text")
    labels = [text] if text is None or isinstance(text, str) else text
    rows = [
        {"score": score, "label": label or "visual", "box": box, "mask": mask}
        for label, of_prompt in zip(labels, found, strict=True)
        for score, box, mask in zip(
            of_prompt["scores"].tolist(),
            of_prompt["boxes"].int().tolist(),
            of_prompt["masks"].numpy(),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: -row["score"])


def assert_same(found: list[dict], wanted: list[dict]) -> None:
    assert len(found) == len(wanted) > 0
    for one, other in zip(found, wanted, strict=True):
        assert set(one) == {"score", "label", "box", "mask"}
        assert one["label"] == other["label"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-5)
        sides = one["box"]
        assert list(sides) == ["xmin", "ymin", "xmax", "ymax"]
        np.testing.assert_allclose(list(sides.values()), other["box"], atol=1)
        pixels = np.array(one["mask"])
        assert one["mask"].mode == "L"
        assert set(np.unique(pixels)) <= {0, 255}
        assert pixels.shape == other["mask"].shape
        assert np.mean((pixels > 0) != other["mask"]) < 1e-3


@pytest.mark.parametrize("bias", [3.0, -1.0])
def test_a_threshold_is_one_of_calibrated_scores(pipe, bias, monkeypatch):
    image = picture(0)
    wanted = expected(pipe, image, text=["a cat", "dog"])
    middle = (wanted[2]["score"] + wanted[3]["score"]) / 2
    logit = np.log(middle / (1 - middle))

    monkeypatch.setattr(pipe.processor.image_processor, "score_temperature", 0.5)
    monkeypatch.setattr(pipe.processor.image_processor, "score_bias", bias)
    threshold = float(1 / (1 + np.exp(-(logit / 0.5 + bias))))
    found = pipe(image, text=["a cat", "dog"], threshold=threshold)

    assert len(found) == 3
    assert_same(found, expected(pipe, image, threshold, text=["a cat", "dog"]))
    assert [one["label"] for one in found] == [one["label"] for one in wanted[:3]]


class EncoderCounter:
    """Counts images that pass the vision encoder."""

    def __init__(self, model):
        self.images, self.calls = 0, 0
        self.hook = model.vision_encoder.register_forward_hook(self.count, with_kwargs=True)

    def count(self, module, args, kwargs, output):
        self.calls += 1
        self.images += len(args[0] if args else kwargs["pixel_values"])

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.hook.remove()


@pytest.mark.parametrize(
    "prompts",
    [
        {"text": "cat"},
        {"text": ["cat", "a red car", "dog"]},
        {"text": "cat", "input_boxes": [[BOX, OTHER_BOX]], "input_boxes_labels": [[1, 0]]},
        {"input_boxes": [[BOX]]},
        {"text": "cat", "input_points": [[[20.0, 20.0]]], "input_points_labels": [[1]]},
        {"text": ["cat", "dog"], "input_boxes": [[BOX], None]},
    ],
)
def test_the_pipeline_gives_what_the_model_gives(pipe, prompts):
    image = picture(0)

    found = pipe(image, threshold=0.0, **prompts)

    assert_same(found, expected(pipe, image, **prompts))


def test_exemplars_of_the_single_phrase_need_no_list_around_them(pipe):
    flat = pipe(picture(0), text="cat", input_boxes=[BOX], input_boxes_labels=[0], threshold=0)
    nested = pipe(
        picture(0), text="cat", input_boxes=[[BOX]], input_boxes_labels=[[0]], threshold=0
    )

    assert_same(flat, [{**row, "box": [*row["box"].values()], "mask": np.array(row["mask"]) > 0}
                       for row in nested])  # fmt: skip


def test_exemplars_may_be_arrays_also_in_lists(pipe):
    expected = pipe(picture(0), text="cat", input_boxes=[BOX], threshold=0)

    for boxes in (np.array([BOX]), [np.array(BOX)], [[np.array(BOX)]]):
        assert pipe(picture(0), text="cat", input_boxes=boxes, threshold=0) == expected


def test_phrases_may_look_for_what_exemplars_show(pipe):
    found = pipe(picture(0), input_boxes=[BOX], threshold=0)

    assert {row["label"] for row in found} == {"visual"}


def test_an_image_is_encoded_once_whatever_the_number_of_phrases(pipe):
    phrases = [f"thing {number}" for number in range(11)]

    with EncoderCounter(pipe.model) as counter:
        found = pipe(picture(0), text=phrases, threshold=0, prompts_per_batch=4)

    assert counter.images == 1
    assert {row["label"] for row in found} == set(phrases)


def test_how_many_prompts_run_at_once_changes_nothing_but_memory(pipe):
    phrases = ["cat", "dog", "car", "tree", "house"]

    found = pipe(picture(0), text=phrases, threshold=0, prompts_per_batch=2)

    assert_same(found, expected(pipe, picture(0), text=phrases))


def test_images_of_a_batch_have_their_own_sizes_and_prompts(pipe):
    requests = [
        {"image": picture(0), "text": ["cat", "dog"], "input_boxes": [[BOX], None]},
        {"image": picture(1, 50, 80), "text": "car"},
        {"image": picture(2, 64, 64), "input_points": [[5, 6], [7, 8]]},
    ]

    with EncoderCounter(pipe.model) as counter:
        found = pipe(requests, batch_size=2, threshold=0)

    assert (counter.calls, counter.images) == (2, 3)
    assert_same(
        found[0], expected(pipe, picture(0), text=["cat", "dog"], input_boxes=[[BOX], None])
    )
    assert_same(found[1], expected(pipe, picture(1, 50, 80), text="car"))
    points = [[[5, 6], [7, 8]]]
    assert_same(found[2], expected(pipe, picture(2, 64, 64), input_points=points))


def test_a_flat_list_of_phrases_goes_with_every_image_and_a_nested_one_with_each(pipe):
    images = [picture(0), picture(1)]

    every = pipe(images, text=["cat", "dog"], threshold=0)
    each = pipe(images, text=[["cat"], ["dog", "car"]], threshold=0)

    assert [{row["label"] for row in rows} for rows in every] == [{"cat", "dog"}] * 2
    assert [{row["label"] for row in rows} for rows in each] == [{"cat"}, {"dog", "car"}]


def test_generators_and_datasets_stream(pipe):
    class Pictures(Dataset):
        def __len__(self):
            return 3

        def __getitem__(self, index):
            return {"image": picture(index), "text": "cat"}

    from_dataset = list(pipe(Pictures(), batch_size=2, threshold=0))
    from_generator = list(pipe((picture(index) for index in range(3)), text="cat", threshold=0))

    for index, (one, other) in enumerate(zip(from_dataset, from_generator, strict=True)):
        wanted = expected(pipe, picture(index), text="cat")
        assert_same(one, wanted)
        assert_same(other, wanted)


def test_only_scores_above_the_threshold_are_kept(pipe):
    everything = pipe(picture(0), text=["cat", "dog"], threshold=0)
    scores = [row["score"] for row in everything]
    middle = (scores[3] + scores[4]) / 2

    found = pipe(picture(0), text=["cat", "dog"], threshold=middle)

    assert scores == sorted(scores, reverse=True)
    assert [row["score"] for row in found] == pytest.approx(scores[:4])
    assert pipe(picture(0), text="cat", threshold=1.0) == []


def test_top_k_keeps_the_best_of_all_phrases(pipe):
    everything = pipe(picture(0), text=["cat", "dog"], threshold=0)

    found = pipe(picture(0), text=["cat", "dog"], threshold=0, top_k=3)

    assert [(row["score"], row["label"]) for row in found] == [
        (row["score"], row["label"]) for row in everything[:3]
    ]


def test_the_mask_threshold_is_heeded(pipe):
    def areas(threshold: float) -> int:
        found = pipe(picture(0), text="cat", threshold=0, mask_threshold=threshold)
        return sum(np.count_nonzero(np.array(row["mask"])) for row in found)

    assert areas(0.01) > areas(0.5) > areas(0.99)


def test_parameters_given_at_construction_are_defaults(folder):
    pipe = pipeline(TASK, model=str(folder), device="cpu", threshold=0.0, top_k=1)

    assert len(pipe(picture(0), text="cat")) == 1
    assert len(pipe(picture(0), text="cat", top_k=2)) == 2


def test_images_come_as_paths_arrays_and_tensors(pipe, tmp_path):
    image = picture(0)
    path = tmp_path / "picture.png"
    image.save(path)
    pixels = np.array(image)
    encoded = base64.b64encode(path.read_bytes()).decode()
    wanted = expected(pipe, image, text="cat")

    for source in (
        path,
        str(path),
        pixels,
        torch.as_tensor(pixels).movedim(-1, 0),
        f"data:image/png;base64,{encoded}",
    ):
        assert_same(pipe(source, text="cat", threshold=0), wanted)


def test_a_picture_on_its_side_is_turned_upright(pipe, tmp_path):
    path = tmp_path / "picture.png"
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    picture(0).save(path, exif=exif)

    for source in (path, Image.open(path)):
        (found, *_) = pipe(source, text="cat", threshold=0)

        assert found["mask"].size == (60, 90)


@pytest.fixture
def web():
    """The address of a server on loopback with one picture."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            buffer = BytesIO()
            picture(0).save(buffer, "PNG")
            self.send_response(200 if self.path == "/picture.png" else 404)
            self.end_headers()
            self.wfile.write(buffer.getvalue())

        def log_message(self, *arguments):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_images_come_from_the_web(pipe, web):
    found = pipe(f"{web}/picture.png", text="cat", threshold=0, timeout=10)

    assert_same(found, expected(pipe, picture(0), text="cat"))
    with pytest.raises(ValueError, match=r"No image came from .*404"):
        pipe(f"{web}/nothing.png", text="cat", timeout=10)


@pytest.mark.parametrize(
    ("inputs", "parameters", "message"),
    [
        (picture(0), {}, "nothing to look for"),
        (picture(0), {"text": []}, "list of phrases is empty"),
        (picture(0), {"text": " "}, "A phrase is empty"),
        (picture(0), {"text": "cat", "treshold": 0.1}, r"Unknown parameters \['treshold'\]"),
        (picture(0), {"text": ["a", "b"], "input_boxes": [BOX]}, "do not fit 2 phrases"),
        (picture(0), {"text": "a", "input_boxes": BOX}, r"\[\[x1, y1, x2, y2\]\]"),
        (picture(0), {"text": "a", "input_points_labels": [1]}, "needs input_points"),
        (picture(0), {"input_boxes": [[200, 0, 300, 50]]}, "outside the image"),
        (picture(0), {"text": 5}, "text must be a phrase or a list of phrases, not 5"),
        (picture(0), {"text": ["a", 5]}, "text must be a phrase or a list of phrases, not"),
        (picture(0), {"text": "a", "threshold": "0.5"}, "threshold must be a number .* not '0.5'"),
        (picture(0), {"text": "a", "top_k": 0}, "top_k=0 must be at least 1"),
        (picture(0), {"text": [["a"], ["b"]]}, "lists of phrases do not fit"),
        ([picture(0)], {"text": [["a"], ["b"]]}, "2 lists of phrases do not fit 1 images"),
        ({"picture": picture(0)}, {}, "'image' must be there"),
        ({"image": picture(0), "txt": "a"}, {}, "this one has"),
        ("nowhere.png", {"text": "a"}, "There is no image 'nowhere.png'"),
        (7, {"text": "a"}, "not int"),
        (np.zeros((2, 3, 8, 8), np.uint8), {"text": "a"}, "several images as a list"),
    ],
)
def test_what_makes_no_sense_is_said(pipe, inputs, parameters, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pipe(inputs, **parameters)


def test_a_file_that_is_no_image_is_said(pipe, tmp_path):
    path = tmp_path / "broken.png"
    path.write_bytes(b"no picture")

    with pytest.raises(ValueError, match="not an image that can be read"):
        pipe(path, text="cat")


def test_no_images_give_no_results(pipe):
    assert pipe([], text="cat") == []


def test_a_tracker_or_a_missing_processor_is_said(tracker, model, processor):
    with pytest.raises(ValueError, match="needs an EfficientSam3Model, not EfficientSam3Tracker"):
        PromptableConceptSegmentationPipeline(model=tracker, processor=processor, device="cpu")
    with pytest.raises(ValueError, match="pass processor="):
        PromptableConceptSegmentationPipeline(model=model, device="cpu")


def test_a_model_object_goes_with_a_processor(model, processor):
    pipe = pipeline(TASK, model=model, processor=processor, device="cpu")

    assert_same(pipe(picture(0), text="cat", threshold=0), expected(pipe, picture(0), text="cat"))


def test_device_and_dtype_are_respected(folder):
    pipe = pipeline(TASK, model=str(folder), device="cpu", dtype=torch.bfloat16)

    found = pipe([picture(0), picture(1)], text="cat", threshold=0, batch_size=2)

    assert (pipe.dtype, pipe.device.type) == (torch.bfloat16, "cpu")
    assert [len(rows) for rows in found] == [5, 5]


@pytest.mark.gpu
def test_the_pipeline_runs_on_a_gpu(folder, pipe):
    on_gpu = pipeline(TASK, model=str(folder), device="cuda")
    requests = [{"image": picture(0), "text": ["cat", "dog"]}, {"image": picture(1), "text": "car"}]

    found = on_gpu(requests, threshold=0, batch_size=2)

    for one, other in zip(found, pipe(requests, threshold=0), strict=True):
        assert [row["score"] for row in one] == pytest.approx(
            [row["score"] for row in other], abs=2e-3
        )


RELOAD = """
import json, sys
import efficientsam3_hf
from transformers import pipeline
first, second, image = sys.argv[1:]
for folder in (first, second):
    pipe = pipeline(model=folder, trust_remote_code=True, device="cpu")
    found = pipe(image, text=["cat", "dog"], threshold=0)
    print(json.dumps([type(pipe).__module__, [[r["score"], r["label"], r["box"]] for r in found]]))
    if folder == first:
        pipe.save_pretrained(second)
"""


def test_a_saved_pipeline_loads_by_itself_and_can_be_saved_again(pipe, tmp_path):
    image, first, second = tmp_path / "picture.png", tmp_path / "first", tmp_path / "second"
    picture(0).save(image)
    wanted = pipe(image, text=["cat", "dog"], threshold=0)
    pipe.save_pretrained(first)

    arguments = [str(path) for path in (first, second, image)]
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", RELOAD, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 0, result.stderr[-2000:]
    lines = result.stdout.splitlines()
    assert len(lines) == 2
    for module, found in map(json.loads, lines):
        assert module.startswith("transformers_modules.")  # the copied code, not the package's
        assert found == [[row["score"], row["label"], row["box"]] for row in wanted]
    for folder in (first, second):
        files = {path.name for path in folder.iterdir()}
        assert files >= {"pipelines.py", "processor_config.json", "tokenizer.json"}
        assert "preprocessor_config.json" not in files  # the processor's file holds it


def test_a_folder_for_all_tasks_keeps_them_when_it_gets_the_pipeline(pipe, folder, tmp_path):
    family = shutil.copytree(folder, tmp_path / "family")
    pipelines.write_pipeline(family)
    pipe.save_pretrained(tmp_path / "alone")

    loaded = pipeline(model=str(family), trust_remote_code=True, device="cpu")

    assert_same(loaded(picture(0), text="cat", threshold=0), expected(pipe, picture(0), text="cat"))
    assert type(loaded).__module__.startswith("transformers_modules.")
    tracker = AutoModelForMaskGeneration.from_pretrained(family)  # raises for missing weights
    assert type(tracker).__name__ == "EfficientSam3TrackerModel"
    of_family, of_pipeline = (
        json.loads((path / "config.json").read_text())["custom_pipelines"]
        for path in (family, tmp_path / "alone")
    )
    assert of_family == of_pipeline
    with pytest.raises(ValueError, match=r"has no config.json"):
        pipelines.write_pipeline(tmp_path)


def test_a_folder_with_code_of_its_own_can_run_the_code_of_the_package(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)

    with pytest.raises(ValueError, match="trust_remote_code=True"):
        pipeline(TASK, model=str(tmp_path), device="cpu")
    loaded = pipeline(
        TASK,
        model=str(tmp_path),
        pipeline_class=PromptableConceptSegmentationPipeline,
        device="cpu",
    )

    assert type(loaded) is PromptableConceptSegmentationPipeline
    assert len(loaded(picture(0), text="cat", threshold=0)) == 5


def test_saving_leaves_the_pipeline_as_it_was(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)

    assert pipe.tokenizer is pipe.processor.tokenizer
    assert pipe.image_processor is pipe.processor.image_processor
    assert len(pipe([picture(0), picture(1)], text="cat", batch_size=2, threshold=0)) == 2


class Complaints(logging.Handler):
    """Collects what transformers has to say."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def complaints():
    handler = Complaints()
    logging.getLogger("transformers").addHandler(handler)
    yield handler.messages
    logging.getLogger("transformers").removeHandler(handler)


def test_zero_shot_object_detection_finds_the_boxes_of_the_concept_pipeline(
    folder, pipe, complaints
):
    detector = pipeline("zero-shot-object-detection", model=str(folder), device="cpu")
    labels = ["cat", "a red car"]

    found = detector(picture(0), candidate_labels=labels, threshold=0.0)

    wanted = pipe(picture(0), text=labels, threshold=0.0)
    assert [(row["label"], row["box"]) for row in found] == [
        (row["label"], row["box"]) for row in wanted
    ]
    assert [row["score"] for row in found] == pytest.approx([row["score"] for row in wanted])
    assert complaints == []


def test_zero_shot_object_detection_takes_objects(pipe, complaints):
    detector = pipeline(
        "zero-shot-object-detection",
        model=pipe.model,
        tokenizer=pipe.tokenizer,
        image_processor=pipe.image_processor,
        device="cpu",
    )

    found = detector(picture(0), candidate_labels=["cat"], threshold=0.0, top_k=2)

    assert len(found) == 2
    assert complaints == []


def test_the_auto_class_of_zero_shot_object_detection_knows_the_family(folder):
    model = AutoModelForZeroShotObjectDetection.from_pretrained(folder)

    assert type(model).__name__ == "EfficientSam3Model"


def test_mask_generation_works_by_folder_and_by_object(folder, complaints):
    by_folder = pipeline("mask-generation", model=str(folder), device="cpu")
    by_object = pipeline(
        "mask-generation",
        model=by_folder.model,
        image_processor=by_folder.image_processor,
        device="cpu",
    )
    easy = {"points_per_crop": 4, "pred_iou_thresh": -10.0, "stability_score_thresh": 0.0}
    easy["crops_nms_thresh"] = 1.0  # random masks are much alike

    found = by_folder(picture(0), points_per_batch=5, **easy)
    same = by_object(picture(0), **easy)

    assert type(by_folder.model).__name__ == "EfficientSam3TrackerModel"
    assert len(found["masks"]) > 1
    torch.testing.assert_close(found["scores"], same["scores"])
    for one, other in zip(found["masks"], same["masks"], strict=True):
        assert one.shape == (60, 90)
        assert torch.equal(one, other)
    assert complaints == []


def test_mask_generation_works_in_half_precision(folder):
    generator = pipeline("mask-generation", model=str(folder), device="cpu", dtype=torch.bfloat16)

    found = generator(
        picture(0),
        points_per_crop=4,
        pred_iou_thresh=-10.0,
        stability_score_thresh=0.0,
        crops_nms_thresh=1.0,
    )

    assert generator.dtype == torch.bfloat16
    assert len(found["masks"]) == len(found["scores"]) > 1


def test_the_calls_in_the_documentation_work(pipe):
    page = Path(__file__).parents[1] / "docs" / "pipelines.md"
    calls = re.findall(r"`(pipe\(.+?\))`", page.read_text())
    names = {
        **{"pipe": pipe, "image": picture(0), "first": picture(1), "second": picture(2)},
        **{"box": BOX, "other": OTHER_BOX, "x": 20, "y": 30},
        **dict(zip(("x1", "y1", "x2", "y2"), BOX, strict=True)),
    }

    assert len(calls) == 9
    for call in calls:
        images = 1 if call.startswith("pipe(image") else 2
        found = eval(call.removesuffix(")") + ", threshold=0)", names)
        assert len(found) == images if images > 1 else isinstance(found[0]["score"], float), call


def test_the_examples_in_docstrings_are_right():
    assert doctest.testmod(pipelines).attempted > 0
    assert doctest.testmod(pipelines).failed == 0
