"""A running service for a folder of EfficientSAM3, in the form that Hugging Face's endpoints load.

`write_handler` of `efficientsam3_hf.hub.endpoint` copies this file into a folder, so it imports
nothing of the package but, where it is installed, the package itself.

A request is `{"inputs": image, "parameters": {...}}`. The image is base64 in JSON, or bytes; it is
never fetched from an address. `parameters["task"]` is one of

* `"promptable-concept-segmentation"` (default): `text`, a phrase or several, and exemplars;
* `"promptable-visual-segmentation"`: the objects at points or in boxes;
* `"mask-generation"`: everything in sight.
"""

import base64
import binascii
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    Sam3TrackerProcessor,
    pipeline,
)
from transformers.utils import logging

NEEDS_REMOTE_CODE = importlib.util.find_spec("efficientsam3_hf") is None
if not NEEDS_REMOTE_CODE:
    importlib.import_module("efficientsam3_hf")  # makes the Auto classes know the family

try:
    from pycocotools import mask as coco_masks
except ImportError:
    coco_masks = None

logger = logging.get_logger(__name__)

CONCEPT_TASK = "promptable-concept-segmentation"
VISUAL_TASK = "promptable-visual-segmentation"
EVERYTHING_TASK = "mask-generation"

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
BOX_SIDES = ("xmin", "ymin", "xmax", "ymax")
MOST_NESTED = 8  # of which parameters need half: objects, their points, coordinates


@dataclass(frozen=True)
class Limits:
    """What a single request may ask for.

    Args:
        image_bytes: Size of the image file.
        image_pixels: Width times height.
        pixels_for_everything: The same for mask generation, which holds many masks at a time.
        phrases: Phrases of a concept request.
        phrase_letters: Length of one of them.
        exemplars: Boxes, and points, of a concept request, all phrases together.
        objects: Objects of a visual request.
        points: Points of one object.
        points_per_side: Grid of mask generation.
        points_per_batch: Points of that grid run at once.
        masks: Masks of an answer, the best ones.
        prompts_per_batch: Phrases run at once; more take more memory.
    """

    image_bytes: int = 20 * 2**20
    image_pixels: int = 16_000_000
    pixels_for_everything: int = 4_000_000
    phrases: int = 32
    phrase_letters: int = 500
    exemplars: int = 64
    objects: int = 64
    points: int = 32
    points_per_side: int = 32
    points_per_batch: int = 64
    masks: int = 200
    prompts_per_batch: int = 8


class EndpointHandler:
    """Answers requests for concepts, for objects at points and boxes, and for all masks.

    Args:
        path: Folder, or name on the Hub, of the weights.
        limits: What a request may ask for.
        device: Where to run; a GPU if there is one, unless said otherwise.
    """

    def __init__(self, path: str = "", limits: Limits | None = None, device: str | None = None):
        self.limits = limits or Limits()
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        options = {"trust_remote_code": True} if NEEDS_REMOTE_CODE else {}
        config: Any = AutoConfig.from_pretrained(path, **options)
        self.processor = AutoProcessor.from_pretrained(path, **options)
        self.model = self.tracker = None
        self.why_no_tracker = "its configuration has no tracker"
        if config.model_type != "efficientsam3_tracker":
            self.model = AutoModel.from_pretrained(path, **options).eval().to(self.device)
        if self.model is None or config.tracker_config is not None:
            self.tracker = self.load_tracker(path, options)
        if self.tracker is not None:
            image_processor = self.processor.image_processor
            self.tracker_processor = Sam3TrackerProcessor(image_processor)
            self.generate_masks = pipeline(
                EVERYTHING_TASK,
                model=self.tracker,
                image_processor=image_processor,
                device=self.device,
            )

    def load_tracker(self, path: str, options: dict[str, Any]) -> Any:
        """The tracker of the folder; None if the weights serve concepts only."""
        try:
            tracker = AutoModelForMaskGeneration.from_pretrained(path, **options)
        except ValueError as error:
            if self.model is None:
                raise
            self.why_no_tracker = str(error)
            logger.warning(f"Only requests for concepts will be answered: {error}")
            return None
        if self.model is not None:
            # A folder stores the trunk once, for both; so does the memory.
            tracker.vision_encoder.backbone = self.model.vision_encoder.backbone
        return tracker.eval().to(self.device)

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """Answer a request; a request that makes no sense is a `ValueError` that says why.

        Args:
            data: `inputs`, the image, and `parameters`.

        Returns:
            `task`, `height`, `width`, and a list of `instances`, best first (of objects: in the
            order of the request). Each has `score`, `box`, `mask`, and in concept requests `label`.
        """
        if not isinstance(data, dict) or "inputs" not in data:
            raise ValueError('A request is {"inputs": image, "parameters": {...}}.')
        parameters = data.get("parameters") or {}
        if not isinstance(parameters, dict):
            raise ValueError(f"parameters must be an object, not {type(parameters).__name__}.")
        if is_deeper(parameters, MOST_NESTED):
            raise ValueError(f"parameters are nested more than {MOST_NESTED} deep; none is that.")
        tasks: dict[str, Callable[[Image.Image, Parameters], Iterator[dict[str, Any]]]] = {
            CONCEPT_TASK: self.find_concepts,
            VISUAL_TASK: self.find_objects,
            EVERYTHING_TASK: self.find_everything,
        }
        task = parameters.get("task", CONCEPT_TASK)
        if task not in list(tasks):  # which may be asked for anything, hashable or not
            raise ValueError(f"There is no task {task!r}. The tasks are {list(tasks)}.")
        if task == CONCEPT_TASK and self.model is None:
            raise ValueError("This service holds a tracker only, which knows no phrases.")
        if task != CONCEPT_TASK and self.tracker is None:
            raise ValueError(f"This service answers {CONCEPT_TASK!r} only: {self.why_no_tracker}.")
        image = open_image(data["inputs"], self.limits)
        reader = Parameters(task, parameters)
        encode = {"rle": encode_rle, "png": encode_png}[
            reader.choice("mask_format", "rle", ("rle", "png"))
        ]
        # Masks come and are encoded one by one: as pixels, those of an answer may fill the memory.
        with torch.inference_mode():
            instances = [
                {**instance, "mask": encode(instance["mask"].cpu().numpy())}
                for instance in tasks[task](image, reader)
            ]
        return {"task": task, "height": image.height, "width": image.width, "instances": instances}

    def find_concepts(self, image: Image.Image, reader: "Parameters") -> Iterator[dict[str, Any]]:
        """Instances of phrases and of what looks like the exemplars."""
        phrases = reader.phrases("text", self.limits)
        exemplars = reader.exemplars(None if phrases is None else len(phrases), self.limits)
        threshold = reader.number("threshold", 0.5, 0, 1)
        mask_threshold = reader.number("mask_threshold", 0.5, 0, 1)
        top_k = reader.count("top_k", self.limits.masks, self.limits.masks)
        reader.finish()
        if phrases is None and not exemplars:
            raise ValueError(
                "There is nothing to look for: give text, input_boxes or input_points, or "
                f'"task": "{VISUAL_TASK}" or "{EVERYTHING_TASK}".'
            )
        inputs = self.processor(images=image, text=phrases, **exemplars).to(self.device)
        best = self.best_candidates(inputs, threshold, top_k)
        for index, prompt in enumerate(best["prompt"].tolist()):
            label = None if phrases is None else phrases[min(prompt, len(phrases) - 1)]
            one = {
                name: tensor[None, index : index + 1]
                for name, tensor in best.items()
                if name not in ("prompt", "score")
            }
            (instances,) = self.processor.post_process_instance_segmentation(
                SimpleNamespace(**one),
                threshold=-1.0,  # it has passed it already
                mask_threshold=mask_threshold,
                target_sizes=[(image.height, image.width)],
            )
            for score, box, mask in zip(
                *map(instances.get, ("scores", "boxes", "masks")), strict=True
            ):
                yield describe(score, box, mask, label=label or "visual")

    def best_candidates(
        self, inputs: dict[str, Tensor], threshold: float, top_k: int
    ) -> dict[str, Tensor]:
        """The best predictions of all prompts, in a row, best first.

        Args:
            inputs: What the processor made of one image and its prompts.
            threshold: Lowest score, presence included.
            top_k: How many to keep.
        """
        model: Any = self.model
        inputs = dict(inputs)
        features = model.get_vision_features(inputs.pop("pixel_values"))
        best: dict[str, Any] = {}
        for start in range(0, len(inputs.pop("original_sizes")), self.limits.prompts_per_batch):
            some = slice(start, start + self.limits.prompts_per_batch)
            outputs = model(
                vision_embeds=features,
                # A single phrase goes with all exemplars, and the other way round.
                **{name: x[some] if len(x) > 1 else x for name, x in inputs.items()},
            )
            presence = outputs.presence_logits.expand_as(outputs.pred_logits)
            scores = outputs.pred_logits.sigmoid() * presence.sigmoid()
            own = self.processor.image_processor
            if own.score_temperature != 1 or own.score_bias != 0:
                logits = scores.float().logit(eps=1e-7)
                scores = (logits / own.score_temperature + own.score_bias).sigmoid()
            prompts, queries = (scores > threshold).nonzero(as_tuple=True)
            found: dict[str, Any] = {
                "prompt": prompts + start,
                "score": scores[prompts, queries],
                "pred_logits": outputs.pred_logits[prompts, queries],
                "presence_logits": presence[prompts, queries],
                "pred_boxes": outputs.pred_boxes[prompts, queries],
                "pred_masks": outputs.pred_masks[prompts, queries],
            }
            best = {name: torch.cat([best.get(name, x[:0]), x]) for name, x in found.items()}
            order = best["score"].sort(descending=True, stable=True).indices[:top_k]
            best = {name: tensor[order] for name, tensor in best.items()}
        return best

    def find_objects(self, image: Image.Image, reader: "Parameters") -> Iterator[dict[str, Any]]:
        """The object at each list of points, or in each box."""
        tracker: Any = self.tracker
        size = (image.height, image.width)
        boxes = reader.boxes("input_boxes", size, self.limits)
        points, labels = reader.points("input_points", "input_labels", size, self.limits)
        multimask = reader.flag("multimask", False)
        mask_threshold = reader.number("mask_threshold", 0.0, -20, 20)
        reader.finish()
        if boxes is None and points is None:
            raise ValueError("Say where the objects are: input_points or input_boxes.")
        if boxes is not None and points is not None and len(boxes) != len(points):
            raise ValueError(
                f"{len(boxes)} boxes and {len(points)} lists of points: with both, give a box and "
                "a list of points for each object."
            )
        inputs = self.tracker_processor(
            images=image,
            input_points=None if points is None else [points],
            input_labels=None if labels is None else [labels],
            input_boxes=None if boxes is None else [boxes],
            return_tensors="pt",
        ).to(self.device)
        inputs.pop("original_sizes")
        outputs = tracker(**inputs, multimask_output=multimask)
        for number, low_resolution in enumerate(outputs.pred_masks[0]):
            (masks,) = self.processor.image_processor.post_process_masks(
                [low_resolution[None].float()], [size], mask_threshold=mask_threshold
            )
            for score, mask in zip(outputs.iou_scores[0, number], masks[0], strict=True):
                yield describe(score, mask_box(mask), mask, object=number)

    def find_everything(self, image: Image.Image, reader: "Parameters") -> Iterator[dict[str, Any]]:
        """A mask for everything that a grid of points meets."""
        limits = self.limits
        options = {
            "points_per_crop": reader.count("points_per_side", 32, limits.points_per_side),
            "points_per_batch": reader.count("points_per_batch", 16, limits.points_per_batch),
            "pred_iou_thresh": reader.number("pred_iou_thresh", 0.88, -100, 100),
            "stability_score_thresh": reader.number("stability_score_thresh", 0.95, 0, 1),
            "stability_score_offset": reader.number("stability_score_offset", 1.0, 0, 20),
            "mask_threshold": reader.number("mask_threshold", 0.0, -20, 20),
            "crops_nms_thresh": reader.number("crops_nms_thresh", 0.7, 0, 0.9),
        }
        top_k = reader.count("top_k", limits.masks, limits.masks)
        reader.finish()
        check_pixels(image, limits.pixels_for_everything)
        found = self.generate_masks(image, **options)
        for index in found["scores"].sort(descending=True, stable=True).indices[:top_k].tolist():
            mask = torch.as_tensor(found["masks"][index])
            yield describe(found["scores"][index], mask_box(mask), mask)


class Parameters:
    """Reads the parameters of a request, with their limits, and says what is wrong with them.

    Args:
        task: What is asked for.
        given: The parameters as they came.
    """

    def __init__(self, task: str, given: dict[str, Any]):
        self.task = task
        self.given = given
        self.known = {"task"}

    def take(self, name: str, default: Any = None) -> Any:
        self.known.add(name)
        value = self.given.get(name)
        return default if value is None else value

    def finish(self) -> None:
        """Raise if there are parameters that nobody has asked for."""
        if unknown := sorted(set(self.given) - self.known):
            raise ValueError(
                f"Unknown parameters {unknown} of task {self.task!r}. There are "
                f"{sorted(self.known)}."
            )

    def choice(self, name: str, default: str, allowed: Sequence[str]) -> str:
        value = self.take(name, default)
        if value not in allowed:
            raise ValueError(f"{name} must be one of {list(allowed)}, not {value!r}.")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self.take(name, default)
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be true or false, not {value!r}.")
        return value

    def number(self, name: str, default: float, lowest: float, highest: float) -> float:
        value = self.take(name, default)
        if not is_number(value) or not lowest <= value <= highest:
            raise ValueError(f"{name} must be a number from {lowest} to {highest}, not {value!r}.")
        return float(value)

    def count(self, name: str, default: int, highest: int) -> int:
        value = self.take(name, min(default, highest))
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= highest:
            raise ValueError(f"{name} must be a whole number from 1 to {highest}, not {value!r}.")
        return value

    def phrases(self, name: str, limits: Limits) -> list[Any] | None:
        """A phrase or several; null in a list stands for exemplars alone."""
        value = self.take(name)
        if value is None:
            return None
        phrases = [value] if isinstance(value, str) else value
        if not is_list(phrases) or not all(isinstance(item, str | None) for item in phrases):
            raise ValueError(f"{name} must be a phrase or a list of phrases.")
        if not 1 <= len(phrases) <= limits.phrases:
            raise ValueError(f"{name} must hold 1 to {limits.phrases} phrases, not {len(phrases)}.")
        if any(len(item) > limits.phrase_letters for item in phrases if item):
            raise ValueError(f"A phrase of {name} has more than {limits.phrase_letters} letters.")
        return phrases

    def exemplars(self, count: int | None, limits: Limits) -> dict[str, list]:
        """Exemplar boxes and points with their labels, a list or None for each phrase.

        Args:
            count: Number of phrases; None if there are none.
            limits: How many exemplars there may be.
        """
        given = {}
        for name, coordinates in (("input_boxes", 4), ("input_points", 2)):
            exemplars, labels = self.take(name), self.take(f"{name}_labels")
            if not exemplars:
                if labels:
                    raise ValueError(f"{name}_labels needs {name} to go with.")
                continue
            if depth(exemplars) == 2 and count in (None, 1):  # of the single phrase
                exemplars, labels = [exemplars], labels and [labels]
            if not (
                is_list(exemplars)
                and len(exemplars) == (count or len(exemplars))
                and all(is_list(row) for row in exemplars if row is not None)
                and all(is_numbers(one, coordinates) for row in exemplars for one in row or [])
            ):
                raise ValueError(
                    f"{name} must be a list of lists of {coordinates} numbers for a single phrase, "
                    "or hold such a list, or null, for each phrase."
                )
            if sum(len(row or []) for row in exemplars) > limits.exemplars:
                raise ValueError(f"{name} holds more than {limits.exemplars}.")
            given[name] = exemplars
            if labels:
                check_labels(f"{name}_labels", labels, exemplars)
                given[f"{name}_labels"] = labels
        return given

    def boxes(self, name: str, size: tuple[int, int], limits: Limits) -> list | None:
        """A box for each object."""
        boxes = self.take(name)
        if not boxes:
            return None
        if not all(is_numbers(box, 4) for box in checked_list(name, boxes, limits.objects)):
            raise ValueError(f"{name} must be a list of boxes [x1, y1, x2, y2], one an object.")
        for x1, y1, x2, y2 in boxes:
            if not (x1 < x2 and y1 < y2 and x1 < size[1] and y1 < size[0] and x2 > 0 and y2 > 0):
                raise ValueError(
                    f"The box {[x1, y1, x2, y2]} has no area, or lies outside the image of "
                    f"{size[1]} x {size[0]} pixels."
                )
        return boxes

    def points(
        self, name: str, labels_name: str, size: tuple[int, int], limits: Limits
    ) -> tuple[list | None, list | None]:
        """A list of points for each object, and their labels: 1 on it, 0 beside it."""
        points, labels = self.take(name), self.take(labels_name)
        if not points:
            if labels:
                raise ValueError(f"{labels_name} needs {name} to go with.")
            return None, None
        for of_object in checked_list(name, points, limits.objects):
            of_object = checked_list(f"An object of {name}", of_object, limits.points)
            for point in of_object:
                if not is_numbers(point, 2):
                    raise ValueError(
                        f"{name} must be a list of lists of points [x, y], one list an object."
                    )
                if not (0 <= point[0] <= size[1] and 0 <= point[1] <= size[0]):
                    raise ValueError(
                        f"The point {point} lies outside the image of {size[1]} x {size[0]} pixels."
                    )
        if not labels:
            return points, [[1] * len(of_object) for of_object in points]
        check_labels(labels_name, labels, points)
        return points, labels


def open_image(source: Any, limits: Limits) -> Image.Image:
    """The upright image in base64, bytes, or from PIL, if it keeps the limits."""
    if isinstance(source, str):
        source = decode_base64(source, limits)
    if isinstance(source, bytes | bytearray | memoryview):
        if len(source) > limits.image_bytes:
            raise ValueError(f"The image has more than {limits.image_bytes} bytes.")
        source = read(lambda: Image.open(BytesIO(source), formats=IMAGE_FORMATS))
    if not isinstance(source, Image.Image):
        raise ValueError(f"inputs must be an image as base64, not {type(source).__name__}.")
    # Before the first pixel is decoded: a small file may hold an image of any size.
    check_pixels(source, limits.image_pixels)
    return read(lambda: ImageOps.exif_transpose(source))


def read(decode: Callable[[], Image.Image]) -> Image.Image:
    """The image that a call of Pillow gives."""
    try:
        return decode()
    except Exception as error:  # Pillow has many kinds for broken files
        raise ValueError(
            f"inputs is not an image that can be read ({error}). Send one of "
            f"{', '.join(IMAGE_FORMATS)}."
        ) from error


def check_pixels(image: Image.Image, most: int) -> None:
    if image.width * image.height > most:
        raise ValueError(
            f"The image has {image.width} x {image.height} pixels, more than {most} in all. Send a "
            "smaller one."
        )


def decode_base64(text: str, limits: Limits) -> bytes:
    """The bytes of base64, with or without `data:image/...;base64,` before them."""
    if text.startswith(("http://", "https://")):
        raise ValueError("This service fetches nothing: send the image itself, as base64.")
    if len(text) > limits.image_bytes * 3 // 2:
        raise ValueError(f"The image has more than {limits.image_bytes} bytes.")
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"inputs is not an image as base64: {error}.") from error


def describe(score: Tensor, box: Tensor, mask: Tensor, **fields: Any) -> dict[str, Any]:
    """An instance as it is answered, but for the mask, which is a tensor still."""
    sides = dict(zip(BOX_SIDES, box.tolist(), strict=True))
    return {**fields, "score": score.item(), "box": sides, "mask": mask}


def mask_box(mask: Tensor) -> Tensor:
    """The smallest box around a mask, zeros around an empty one.

    >>> mask_box(torch.tensor([[False, False], [True, True]])).tolist()
    [0.0, 1.0, 2.0, 2.0]
    """
    rows, columns = mask.any(dim=1).nonzero()[:, 0], mask.any(dim=0).nonzero()[:, 0]
    if not len(rows):
        return torch.zeros(4)
    return torch.stack([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()


def encode_rle(mask: np.ndarray) -> dict[str, Any]:
    """COCO's run lengths: compressed where pycocotools is installed, else as plain counts.

    pycocotools reads both.
    """
    height, width = mask.shape
    if coco_masks is not None:
        encoded = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
        return {"size": [height, width], "counts": encoded["counts"].decode("ascii")}
    return {"size": [height, width], "counts": run_lengths(mask)}


def run_lengths(mask: np.ndarray) -> list[int]:
    """Pixels off, on, off, ... going down the columns, as COCO counts them.

    >>> run_lengths(np.array([[True, False], [True, True]]))
    [0, 2, 1, 1]
    """
    pixels = np.concatenate([[False], mask.flatten(order="F")])
    changes = np.flatnonzero(pixels[1:] != pixels[:-1])
    return np.diff(np.concatenate([[0], changes, [mask.size]])).tolist()


def encode_png(mask: np.ndarray) -> str:
    """A black and white PNG as base64."""
    buffer = BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).convert("1").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def is_number(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float is large enough for
        return False


def is_numbers(value: Any, count: int) -> bool:
    return is_list(value) and len(value) == count and all(is_number(item) for item in value)


def checked_list(name: str, value: Any, most: int) -> Sequence[Any]:
    """A list of 1 to `most` items."""
    if not is_list(value) or not 1 <= len(value) <= most:
        raise ValueError(f"{name} must be a list of 1 to {most} items.")
    return value


def check_labels(name: str, labels: Any, labelled: Sequence[Any]) -> None:
    """Raise unless there is 1 or 0 for each box or point."""
    if (
        depth(labels) != 2
        or [len(row or []) for row in labels] != [len(row or []) for row in labelled]
        or any(label not in (0, 1) for row in labels for label in row or [])
    ):
        raise ValueError(f"{name} must hold 1 or 0 for each of what they label.")


def is_deeper(value: Any, most: int) -> bool:
    """Whether containers lie in each other more than so deep."""
    level = [value]
    for _ in range(most + 1):
        containers = [item for item in level if is_list(item) or isinstance(item, dict)]
        level = [
            x for item in containers for x in (item.values() if isinstance(item, dict) else item)
        ]
    return bool(containers)


def depth(nested: Any) -> int:
    """How deep lists are nested: 0 for anything but a list."""
    return 1 + max((depth(item) for item in nested), default=0) if is_list(nested) else 0
