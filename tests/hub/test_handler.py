"""The endpoint: real requests over loopback, answers compared with the models called directly."""

import ast
import base64
import doctest
import http.client
import importlib.util
import json
import re
import sys
import threading
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny_model, tiny_tracker

from efficientsam3_hf import EfficientSam3TrackerProcessor, zoo
from efficientsam3_hf.hub import handler as handler_module
from efficientsam3_hf.hub.endpoint import REQUIREMENTS, write_handler
from efficientsam3_hf.hub.handler import EndpointHandler, Limits
from examples.serve import make_server

ROOT = Path(__file__).parents[2]
VISUAL = "promptable-visual-segmentation"
BOX = [10.0, 10.0, 50.0, 40.0]
EASY = {"points_per_side": 4, "pred_iou_thresh": -10, "stability_score_thresh": 0}


def picture(width: int = 90, height: int = 60) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 10, width // 10, 3))
    return Image.fromarray(pixels.astype(np.uint8)).resize(
        (width, height), Image.Resampling.BICUBIC
    )


def png(image: Image.Image, **options) -> bytes:
    buffer = BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


IMAGE = base64_of(png(picture()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder for all tasks."""
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    return zoo.save(model.config, tmp_path_factory.mktemp("family"), model, tracker)


@pytest.fixture(scope="module")
def handler(folder) -> EndpointHandler:
    """The handler as an endpoint loads it: from the file in the folder."""
    specification = importlib.util.spec_from_file_location("handler", write_handler(folder))
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module.EndpointHandler(str(folder), device="cpu")


@pytest.fixture(scope="module")
def address(handler):
    """Where the handler is served."""
    server = make_server(handler, port=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def silent_server(monkeypatch):
    monkeypatch.setattr("http.server.BaseHTTPRequestHandler.log_message", lambda *_: None)


def post(address: str, body: bytes, kind: str = "application/json") -> tuple[int, dict]:
    request = urllib.request.Request(address, data=body, headers={"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def ask(address: str, inputs: str = IMAGE, **parameters) -> dict:
    status, answer = post(
        address, json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    )
    assert status == 200, answer
    return answer


def decode(mask: dict | str) -> np.ndarray:
    """A mask out of an answer, as a client would decode it."""
    if isinstance(mask, str):
        image = Image.open(BytesIO(base64.b64decode(mask)))
        assert image.mode == "1"
        return np.array(image)
    counts, pixels = mask["counts"], []
    if isinstance(counts, str):
        counts = uncompress(counts)
    for index, count in enumerate(counts):
        pixels += [bool(index % 2)] * count
    return np.array(pixels).reshape(mask["size"], order="F")


def uncompress(text: str) -> list[int]:
    """COCO's compressed counts: 5 bits a letter, differences from the third on."""
    counts, position = [], 0
    while position < len(text):
        value, shift, more = 0, 0, True
        while more:
            letter = ord(text[position]) - 48
            value |= (letter & 31) << shift
            shift, position, more = shift + 5, position + 1, bool(letter & 32)
            if not more and letter & 16:
                value |= -1 << shift
        counts.append(value + (counts[-2] if len(counts) > 2 else 0))
    return counts


def sides(box: dict) -> list[float]:
    assert list(box) == ["xmin", "ymin", "xmax", "ymax"]
    return list(box.values())


@torch.no_grad()
def find_directly(handler, **prompts) -> list[tuple]:
    inputs = handler.processor(images=picture(), **prompts)
    found = handler.processor.post_process_instance_segmentation(
        handler.model(**inputs), threshold=0.0, target_sizes=inputs["original_sizes"]
    )
    text = prompts.get("text") or ["visual"]
    labels = [text] if isinstance(text, str) else text
    rows = [
        (label, *row)
        for label, of_prompt in zip(labels, found, strict=True)
        for row in zip(
            of_prompt["scores"].tolist(),
            of_prompt["boxes"].tolist(),
            of_prompt["masks"].numpy(),
            strict=True,
        )
    ]
    return sorted(rows, key=lambda row: -row[1])


@pytest.mark.parametrize("mask_format", ["rle", "png"])
@pytest.mark.parametrize(
    ("parameters", "prompts"),
    [
        ({"text": "cat"}, {"text": "cat"}),
        ({"text": ["cat", "a red car"]}, {"text": ["cat", "a red car"]}),
        ({"input_boxes": [BOX]}, {"input_boxes": [[BOX]]}),
        (
            {"text": "cat", "input_boxes": [BOX], "input_boxes_labels": [0]},
            {"text": "cat", "input_boxes": [[BOX]], "input_boxes_labels": [[0]]},
        ),
        (
            {"text": ["cat", "dog"], "input_points": [None, [[5, 6]]]},
            {"text": ["cat", "dog"], "input_points": [None, [[5, 6]]]},
        ),
    ],
)
def test_concepts_equal_those_of_the_model(address, handler, parameters, prompts, mask_format):
    answer = ask(address, **parameters, threshold=0, mask_format=mask_format)

    expected = find_directly(handler, **prompts)
    assert answer["task"] == "promptable-concept-segmentation"
    assert (answer["height"], answer["width"]) == (60, 90)
    assert len(answer["instances"]) == len(expected) > 0
    for instance, (label, score, box, mask) in zip(answer["instances"], expected, strict=True):
        assert instance["label"] == label
        assert instance["score"] == pytest.approx(score, abs=1e-5)
        assert sides(instance["box"]) == pytest.approx(box, abs=1e-2)
        assert np.array_equal(decode(instance["mask"]), mask)


def test_many_phrases_run_in_parts_on_an_image_encoded_once(folder):
    handler = EndpointHandler(str(folder), Limits(prompts_per_batch=2), device="cpu")
    calls = []
    handler.model.vision_encoder.register_forward_hook(lambda *_: calls.append(1))
    phrases = ["cat", "dog", "car", "tree", "house"]

    answer = handler({"inputs": IMAGE, "parameters": {"text": phrases, "threshold": 0}})

    expected = find_directly(handler, text=phrases)
    assert len(calls) == 1 + 1  # of the request, of the comparison
    assert [one["label"] for one in answer["instances"]] == [row[0] for row in expected]
    assert [one["score"] for one in answer["instances"]] == pytest.approx(
        [row[1] for row in expected], abs=1e-5
    )


def test_threshold_and_top_k_are_heeded(address):
    everything = ask(address, text=["cat", "dog"], threshold=0)["instances"]
    scores = [instance["score"] for instance in everything]
    middle = (scores[1] + scores[2]) / 2

    assert ask(address, text=["cat", "dog"], threshold=middle)["instances"] == everything[:2]
    assert ask(address, text=["cat", "dog"], threshold=0, top_k=3)["instances"] == everything[:3]
    assert ask(address, text="cat", threshold=1)["instances"] == []


def test_a_threshold_is_one_of_calibrated_scores(address, handler, monkeypatch):
    everything = ask(address, text=["cat", "dog"], threshold=0)["instances"]
    scores = [instance["score"] for instance in everything]
    middle = (scores[1] + scores[2]) / 2
    own = handler.processor.image_processor

    for bias in (3.0, -3.0):
        monkeypatch.setattr(own, "score_bias", bias)
        threshold = 1 / (1 + np.exp(-(np.log(middle / (1 - middle)) + bias)))
        found = ask(address, text=["cat", "dog"], threshold=float(threshold))["instances"]

        assert [one["box"] for one in found] == [one["box"] for one in everything[:2]]
        logits = [np.log(one["score"] / (1 - one["score"])) - bias for one in found]
        assert [1 / (1 + np.exp(-logit)) for logit in logits] == pytest.approx(scores[:2], abs=1e-4)


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize(
    "prompts",
    [
        {"input_points": [[[20, 20]], [[60, 40], [70, 10]]], "input_labels": [[1], [1, 0]]},
        {"input_boxes": [BOX, [40, 20, 80, 55]]},
        {"input_points": [[[20, 20]]], "input_boxes": [BOX]},
    ],
)
def test_objects_equal_those_of_the_tracker(address, handler, prompts, multimask):
    answer = ask(address, task=VISUAL, multimask=multimask, **prompts)

    labels = prompts.get("input_labels")
    if "input_points" in prompts and labels is None:
        labels = [[1] * len(points) for points in prompts["input_points"]]
    processor = EfficientSam3TrackerProcessor(handler.processor.image_processor)
    nested = {name: [value] for name, value in prompts.items()}
    nested |= {} if labels is None else {"input_labels": [labels]}
    inputs = processor(images=picture(), **nested)
    sizes = inputs.pop("original_sizes")
    with torch.no_grad():
        outputs = handler.tracker(**inputs, multimask_output=multimask)
    masks = processor.post_process_masks(outputs.pred_masks, sizes)[0]
    count = 3 if multimask else 1
    assert len(answer["instances"]) == masks.shape[0] * count
    assert masks.shape[1] == count
    for index, instance in enumerate(answer["instances"]):
        number, which = divmod(index, count)
        assert instance["object"] == number
        assert instance["score"] == pytest.approx(
            outputs.iou_scores[0, number, which].item(), abs=1e-5
        )
        mask = decode(instance["mask"])
        assert np.array_equal(mask, masks[number, which].numpy())
        assert sides(instance["box"]) == box_of(mask)


def box_of(mask: np.ndarray) -> list[float]:
    rows, columns = np.nonzero(mask)
    if not len(rows):
        return [0, 0, 0, 0]
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def test_everything_equals_the_pipeline_of_transformers(address, handler):
    small = {"mask_threshold": 1.0, "crops_nms_thresh": 0.9}  # whole, random masks are much alike
    answer = ask(address, task="mask-generation", **EASY, **small, points_per_batch=5)

    found = handler.generate_masks(
        picture(), points_per_crop=4, pred_iou_thresh=-10, stability_score_thresh=0, **small
    )
    assert len(answer["instances"]) == len(found["masks"]) > 1
    best_first = found["scores"].sort(descending=True, stable=True).indices.tolist()
    for instance, index in zip(answer["instances"], best_first, strict=True):
        mask = found["masks"][index].numpy()
        assert instance["score"] == pytest.approx(found["scores"][index].item(), abs=1e-5)
        assert np.array_equal(decode(instance["mask"]), mask)
        assert sides(instance["box"]) == box_of(mask)


def test_nothing_in_sight_is_an_empty_answer(address):
    answer = ask(address, task="mask-generation", points_per_side=2, pred_iou_thresh=100)

    assert answer["instances"] == []


def test_images_come_in_several_forms(address, handler):
    wanted = ask(address, text="cat", threshold=0)
    parameters = {"text": "cat", "threshold": 0}
    data = png(picture())

    assert ask(address, f"data:image/png;base64,{IMAGE}", **parameters) == wanted
    assert ask(address, IMAGE[:40] + "\n" + IMAGE[40:], **parameters) == wanted
    assert post(f"{address}?parameters={quote(json.dumps(parameters))}", data, "image/png") == (
        200,
        wanted,
    )
    for inputs in (data, bytearray(data), picture()):
        assert handler({"inputs": inputs, "parameters": parameters}) == wanted


def test_an_image_on_its_side_is_turned_upright(address):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter

    answer = ask(address, base64_of(png(picture(), exif=exif)), text="cat", threshold=0)

    assert (answer["height"], answer["width"]) == (90, 60)
    assert answer["instances"][0]["mask"]["size"] == [90, 60]


CONCEPT_ERRORS = [
    ({}, "nothing to look for"),
    ({"text": "a", "treshold": 0.1}, r"Unknown parameters \['treshold'\]"),
    ({"text": "a", "multimask": True}, r"Unknown parameters \['multimask'\] of task"),
    ({"task": "segment"}, "no task 'segment'"),
    ({"task": ["mask-generation"]}, "There is no task"),
    ({"text": []}, "1 to 32 phrases, not 0"),
    ({"text": ["a"] * 33}, "1 to 32 phrases, not 33"),
    ({"text": "a" * 501}, "more than 500 letters"),
    ({"text": 7}, "must be a phrase or a list"),
    ({"text": ["a", None]}, "Prompt 1 has no phrase"),
    ({"text": " "}, "A phrase is empty"),
    ({"text": "a", "threshold": 2}, "threshold must be a number from 0 to 1, not 2"),
    ({"text": "a", "threshold": "0.5"}, "threshold must be a number"),
    ({"text": "a", "threshold": True}, "threshold must be a number"),
    ({"text": "a", "threshold": float("nan")}, "threshold must be a number"),
    ({"text": "a", "top_k": 201}, "whole number from 1 to 200"),
    ({"text": "a", "top_k": 1.5}, "whole number from 1 to 200"),
    ({"text": "a", "mask_format": "jpg"}, "mask_format must be one of"),
    ({"text": "a", "input_boxes": BOX}, "input_boxes must be a list of lists of 4 numbers"),
    ({"text": "a", "input_boxes": [[1, 2, 3, "4"]]}, "list of lists of 4 numbers"),
    ({"text": ["a", "b"], "input_boxes": [BOX]}, "or hold such a list, or null"),
    ({"text": "a", "input_boxes": [BOX] * 65}, "input_boxes holds more than 64"),
    ({"input_boxes": [[100, 0, 120, 10]]}, "outside the image"),
    ({"text": "a", "input_boxes_labels": [1]}, "needs input_boxes"),
    ({"input_boxes": [BOX], "input_boxes_labels": [1, 1]}, "1 or 0 for each"),
    ({"input_boxes": [BOX], "input_boxes_labels": [2]}, "1 or 0 for each"),
    ({"input_points": [[1, 2, 3]]}, "list of lists of 2 numbers"),
]
VISUAL_ERRORS = [
    ({}, "Say where the objects are"),
    ({"text": "a"}, r"Unknown parameters \['text'\]"),
    ({"input_points": [[20, 20]]}, "list of lists of points"),
    ({"input_points": [[[20, 20]]] * 65}, "list of 1 to 64 items"),
    ({"input_points": [[[20, 20]] * 33]}, "list of 1 to 32 items"),
    ({"input_points": [[[20, 200]]]}, r"The point \[20, 200\] lies outside"),
    ({"input_points": [[[20, 20]]], "input_labels": [[1, 1]]}, "1 or 0 for each"),
    ({"input_labels": [[1]]}, "needs input_points"),
    ({"input_boxes": [[5, 5, 5, 9]]}, "has no area"),
    ({"input_boxes": BOX}, "must be a list of boxes"),
    ({"input_boxes": [BOX] * 2, "input_points": [[[20, 20]]]}, "2 boxes and 1 lists of points"),
    ({"input_boxes": [BOX], "multimask": 1}, "multimask must be true or false"),
]
EVERYTHING_ERRORS = [
    ({"points_per_side": 33}, "points_per_side must be a whole number from 1 to 32"),
    ({"points_per_batch": 65}, "points_per_batch must be a whole number from 1 to 64"),
    ({"points_per_batch": 0}, "whole number from 1 to 64"),
    ({"crops_n_layers": 4}, r"Unknown parameters \['crops_n_layers'\]"),
]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        *CONCEPT_ERRORS,
        *(({"task": VISUAL, **parameters}, message) for parameters, message in VISUAL_ERRORS),
        *(
            ({"task": "mask-generation", **parameters}, message)
            for parameters, message in EVERYTHING_ERRORS
        ),
    ],
)
def test_requests_that_make_no_sense_are_answered_with_the_reason(address, parameters, message):
    body = json.dumps({"inputs": IMAGE, "parameters": parameters}).encode()

    status, answer = post(address, body)

    assert status == 400
    assert re.search(message, answer["error"]), answer


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "Expecting property name"),
        (b"[]", "A request is"),
        (b"{}", "A request is"),
        (json.dumps({"inputs": IMAGE, "parameters": [1]}).encode(), "must be an object, not list"),
        (json.dumps({"inputs": 7}).encode(), "an image as base64, not int"),
        (json.dumps({"inputs": "no base64!"}).encode(), "not an image as base64"),
        (json.dumps({"inputs": "/etc/hostname"}).encode(), "not an image"),
        (json.dumps({"inputs": "https://example.com/a.png"}).encode(), "fetches nothing"),
        (json.dumps({"inputs": base64_of(b"text")}).encode(), "not an image that can be read"),
        (
            json.dumps({"inputs": base64_of(png(picture())[:200])}).encode(),
            "not an image that can be read",
        ),
    ],
)
def test_what_is_no_image_is_answered_with_the_reason(address, body, message):
    status, answer = post(address, body)

    assert status == 400
    assert message in answer["error"]


def test_bytes_and_pixels_have_limits(folder):
    limits = Limits(image_bytes=3000, image_pixels=6000, pixels_for_everything=5000)
    handler = EndpointHandler(str(folder), limits, device="cpu")
    noise = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    request = {"parameters": {"text": "cat"}}

    for inputs in (png(Image.fromarray(noise)), base64_of(png(Image.fromarray(noise)))):
        with pytest.raises(ValueError, match="more than 3000 bytes"):
            handler({"inputs": inputs, **request})
    bomb = png(Image.new("1", (100, 61)))
    assert len(bomb) < 200
    with pytest.raises(ValueError, match="100 x 61 pixels, more than 6000 in all"):
        handler({"inputs": bomb, **request})
    with pytest.raises(ValueError, match="90 x 60 pixels, more than 5000"):
        handler(
            {"inputs": png(Image.new("1", (90, 60))), "parameters": {"task": "mask-generation"}}
        )


@pytest.mark.parametrize("size", [(5000, 4000), (40_000, 5_000)])
def test_an_image_of_too_many_pixels_is_refused_before_it_is_decoded(address, size, monkeypatch):
    bomb = json.dumps({"inputs": base64_of(png(Image.new("1", size)))}).encode()
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("was decoded"))

    status, answer = post(address, bomb)

    assert len(bomb) < 100_000
    assert status == 400
    assert "pixels" in answer["error"]


def test_a_request_that_is_too_long_is_refused(folder):
    handler = EndpointHandler(str(folder), Limits(image_bytes=100), device="cpu")
    server = make_server(handler, port=0)
    thread = threading.Thread(target=server.handle_request)
    thread.start()

    status, answer = post(f"http://127.0.0.1:{server.server_port}/", b"x" * 1001)

    thread.join()
    server.server_close()
    assert (status, answer) == (413, {"error": "A request has at most 200 bytes."})


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    "parameters",
    [
        {"threshold": 10**400},
        {"input_boxes": [[1, 1, 10**400, 5]]},
        {"input_boxes": nested(480)},
        {"input_boxes": [BOX], "input_boxes_labels": nested(900)},
        {"task": nested(900)},
        {"top_k": {"a": nested(900)}},
    ],
)
def test_numbers_and_lists_without_end_are_requests_that_make_no_sense(handler, parameters):
    with pytest.raises(ValueError, match=r"must|deep"):
        handler({"inputs": IMAGE, "parameters": {"text": "cat", **parameters}})


@pytest.mark.parametrize(
    ("headers", "body", "message"),
    [
        ({"Content-Length": "abc"}, b"", "Content-Length must be"),
        ({"Content-Length": "-1"}, b"", "Content-Length must be"),
        ({"Content-Length": "200000"}, b"[" * 200_000, "nested too deep"),
    ],
)
def test_requests_that_are_none_are_answered(address, headers, body, message):
    connection = http.client.HTTPConnection(urlsplit(address).netloc, timeout=60)
    headers = {"Content-Type": "application/json", **headers}
    connection.request("POST", "/", body, headers)

    answer = connection.getresponse()

    assert answer.status == 400
    assert message in json.load(answer)["error"]
    connection.close()


def test_every_task_runs_in_half_precision(tmp_path):
    model, tracker = tiny_model().to(torch.bfloat16), tiny_tracker().to(torch.bfloat16)
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    zoo.save(model.config, tmp_path, model, tracker)

    handler = EndpointHandler(str(tmp_path), device="cpu")

    assert handler.model.dtype == handler.tracker.dtype == torch.bfloat16
    for parameters in (
        {"text": "cat", "input_boxes": [BOX], "threshold": 0},
        {"task": VISUAL, "input_points": [[[20, 20]]]},
        {"task": "mask-generation", **EASY},
    ):
        assert handler({"inputs": IMAGE, "parameters": parameters})["instances"]


@pytest.mark.parametrize(
    ("what_is_missing", "reason"),
    [("weights", "The weights do not fit"), ("configuration", "its configuration has no tracker")],
)
def test_a_folder_without_a_tracker_serves_concepts_and_says_so(
    what_is_missing: str, reason: str, tmp_path
):
    model = tiny_model()
    if what_is_missing == "weights":  # its configuration has a tracker all the same
        model.save_pretrained(tmp_path)
        zoo.processor(model.config).save_pretrained(tmp_path)
    else:
        zoo.save(model.config, tmp_path, model)
    handler = EndpointHandler(str(tmp_path), device="cpu")

    answer = handler({"inputs": IMAGE, "parameters": {"text": "cat", "threshold": 0}})

    assert len(answer["instances"]) == 5
    with pytest.raises(ValueError, match=f"concept-segmentation' only: {reason}"):
        handler({"inputs": IMAGE, "parameters": {"task": VISUAL, "input_boxes": [BOX]}})


def test_a_tracker_alone_is_served(tmp_path):
    tracker = tiny_tracker()
    tracker.save_pretrained(tmp_path)
    processor = zoo.processor(tiny_model().config)
    EfficientSam3TrackerProcessor(processor.image_processor).save_pretrained(tmp_path)

    handler = EndpointHandler(str(tmp_path), device="cpu")

    answer = handler({"inputs": IMAGE, "parameters": {"task": VISUAL, "input_boxes": [BOX]}})
    assert len(answer["instances"]) == 1
    with pytest.raises(ValueError, match="a tracker only"):
        handler({"inputs": IMAGE, "parameters": {"text": "cat"}})


def test_the_trunk_is_in_memory_once(handler):
    assert handler.tracker.vision_encoder.backbone is handler.model.vision_encoder.backbone


@pytest.mark.parametrize(
    "mask",
    [
        np.zeros((3, 4), bool),
        np.ones((3, 4), bool),
        np.random.default_rng(0).random((37, 41)) > 0.5,
        np.kron(np.eye(3), np.ones((50, 70))) > 0,
    ],
)
def test_masks_survive_their_encodings(mask):
    plain = {"size": list(mask.shape), "counts": handler_module.run_lengths(mask)}

    assert np.array_equal(decode(plain), mask)
    assert np.array_equal(decode(handler_module.encode_rle(mask)), mask)
    assert np.array_equal(decode(handler_module.encode_png(mask)), mask)


# pycocotools 2.0 predates the keyword; can go when its arrays take `copy`.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_run_lengths_are_compressed_where_pycocotools_is_installed():
    pytest.importorskip("pycocotools")
    from pycocotools import mask as coco_masks

    mask = np.random.default_rng(0).random((37, 41)) > 0.5
    encoded = handler_module.encode_rle(mask)

    assert isinstance(encoded["counts"], str)
    assert np.array_equal(coco_masks.decode(encoded).astype(bool), mask)


def test_run_lengths_are_plain_where_it_is_not(monkeypatch):
    monkeypatch.setattr(handler_module, "coco_masks", None)

    assert handler_module.encode_rle(np.array([[False, True]])) == {
        "size": [1, 2],
        "counts": [1, 1],
    }


def test_the_handler_imports_nothing_that_its_folder_may_lack():
    tree = ast.parse(Path(handler_module.__file__).read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or "."]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }

    foreign = imported - set(sys.stdlib_module_names)
    assert foreign == {"PIL", "numpy", "torch", "transformers", "pycocotools"}


def test_requirements_keep_the_lines_that_were_there(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "requirements.txt").write_text("something==1\nftfy\n")

    assert write_handler(tmp_path) == tmp_path / "handler.py"
    write_handler(tmp_path)

    lines = (tmp_path / "requirements.txt").read_text().splitlines()
    assert lines[:2] == ["something==1", "ftfy"]
    assert sorted(lines) == sorted(["something==1", *REQUIREMENTS])


def test_requirements_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()

    assert all(f'"{line}"' in project for line in REQUIREMENTS)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        write_handler(tmp_path)


def test_the_requests_in_the_documentation_are_answered(address):
    text = (ROOT / "docs" / "pipelines.md").read_text()
    blocks = [json.loads(block) for block in re.findall(r"```json\n(.*?)```", text, re.DOTALL)]
    requests = [block for block in blocks if "inputs" in block]
    (documented,) = [block for block in blocks if "instances" in block]
    large = base64_of(png(picture(640, 430)))

    answers = [
        ask(address, large, **{**request["parameters"]}, **threshold)
        for request, threshold in zip(requests, ({}, {}), strict=True)
    ]

    shown = ask(address, large, **{**requests[0]["parameters"], "threshold": 0})
    assert set(documented) == set(shown) == set(answers[0]) == set(answers[1])
    assert set(documented["instances"][0]) == set(shown["instances"][0])
    assert [instance["object"] for instance in answers[1]["instances"]] == [0, 1]


def test_the_examples_in_docstrings_are_right():
    names = {"np": np, "torch": torch}

    result = doctest.testmod(handler_module, extraglobs=names)

    assert result.attempted > 0
    assert result.failed == 0
