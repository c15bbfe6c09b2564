"""How images are put to a model, whoever made it: phrases, boxes, clicks, features.

transformers' SAM 3, SAM 2 and EdgeTAM share their calls with ours, and so one function serves all.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..data.samples import ImageSample
from ..models.score_calibration import calibrate_scores
from .loading import Loaded

if TYPE_CHECKING:  # its package is an extra, which whoever does not click need not have
    from ..evaluation.mask_iou import Click


@dataclass
class Instances:
    """What was found of one phrase in one image.

    Args:
        masks: Booleans (instances, height, width).
        scores: (instances,), presence of the phrase included.
        boxes_xyxy: (instances, 4), in pixels.
    """

    masks: np.ndarray
    scores: np.ndarray
    boxes_xyxy: np.ndarray


@torch.inference_mode()
def find_concepts(
    loaded: Loaded,
    images: Sequence[np.ndarray],
    phrases: Sequence[Sequence[str]],
    threshold: float = 0.5,
    most: int | None = None,
    prompts_per_batch: int = 8,
) -> list[list[Instances]]:
    """Instances of each phrase in each image; an image is encoded once.

    Args:
        loaded: For the job "concepts".
        images: Pixels (height, width, 3).
        phrases: Of each image.
        threshold: Keep what scores above.
        most: Keep at most so many instances of an image, the best of all its phrases.
        prompts_per_batch: Phrases that go through the detector at once.
    """
    features = encode_images(loaded, images)
    found = []
    for index, (image, of_image) in enumerate(zip(images, phrases, strict=True)):
        candidates = [empty_candidates()]
        for start in range(0, len(of_image), prompts_per_batch):
            some = list(of_image[start : start + prompts_per_batch])
            outputs = detect(loaded, features, index, some)
            candidates.append(select_candidates(loaded, outputs, start, threshold, most))
        best = {
            name: torch.cat([each[name] for each in candidates[1:] or candidates])
            for name in candidates[0]
        }
        order = best["scores"].sort(descending=True, stable=True).indices[:most]
        best = {name: values[order] for name, values in best.items()}
        found.append(finish(loaded, best, image.shape[:2], len(of_image)))
    return found


def pixels_of(samples: Sequence[ImageSample]) -> list[np.ndarray]:
    """The pictures of samples, which were read with pixels."""
    return [np.array(sample.image) for sample in samples]


def encode_images(loaded: Loaded, images: Sequence[np.ndarray]) -> Any:
    """What the vision encoder makes of images of any sizes."""
    return loaded.model.get_vision_features(prepare_images(loaded, images))


def prepare_images(loaded: Loaded, images: Sequence[np.ndarray]) -> Tensor:
    """Pixels as the model takes them."""
    inputs = loaded.processor.image_processor(
        list(images), return_tensors="pt", device=loaded.device
    )
    return inputs["pixel_values"].to(loaded.device, loaded.dtype)


def detect(loaded: Loaded, features: Any, index: int, phrases: Sequence[str]) -> Any:
    """Raw outputs for some phrases of one of the encoded images."""

    def of_image(maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(each[index : index + 1].expand(len(phrases), -1, -1, -1) for each in maps)

    one = type(features)(
        fpn_hidden_states=of_image(features.fpn_hidden_states),
        fpn_position_encoding=of_image(features.fpn_position_encoding),
    )
    text = loaded.to_device(loaded.processor(text=list(phrases), return_tensors="pt"))
    return loaded.model(
        vision_embeds=one, input_ids=text["input_ids"], attention_mask=text["attention_mask"]
    )


def select_candidates(
    loaded: Loaded, outputs: Any, first_phrase: int, threshold: float, most: int | None
) -> dict[str, Tensor]:
    """The best predictions above a threshold, of all phrases in a row, in float32."""
    presence = outputs.presence_logits.float().expand_as(outputs.pred_logits)
    scores = outputs.pred_logits.float().sigmoid() * presence.sigmoid()
    image_processor = loaded.processor.image_processor
    if hasattr(image_processor, "score_temperature"):  # which only ours has
        temperature, bias = image_processor.score_temperature, image_processor.score_bias
        scores = calibrate_scores(scores, temperature, bias)
    phrases, queries = (scores > threshold).nonzero(as_tuple=True)
    order = scores[phrases, queries].sort(descending=True, stable=True).indices[:most]
    phrases, queries = phrases[order], queries[order]
    return {
        "phrase": phrases + first_phrase,
        "scores": scores[phrases, queries],
        "pred_logits": outputs.pred_logits[phrases, queries].float(),
        "presence_logits": presence[phrases, queries],
        "pred_boxes": outputs.pred_boxes[phrases, queries].float(),
        "pred_masks": outputs.pred_masks[phrases, queries].float(),
    }


def empty_candidates() -> dict[str, Tensor]:
    """What an image without phrases has."""
    names = ("scores", "pred_logits", "presence_logits")
    return {
        "phrase": torch.zeros(0, dtype=torch.long),
        **{name: torch.zeros(0) for name in names},
        "pred_boxes": torch.zeros(0, 4),
        "pred_masks": torch.zeros(0, 1, 1),
    }


def finish(
    loaded: Loaded, best: dict[str, Tensor], size: tuple[int, ...], count: int
) -> list[Instances]:
    """Candidates in the size of the image, as the model's own processor makes them."""
    phrases = best.pop("phrase").cpu().numpy()
    if not len(phrases):
        return [
            Instances(np.zeros((0, *size), dtype=bool), np.zeros(0), np.zeros((0, 4)))
            for _ in range(count)
        ]
    # Each has passed the threshold already, in the arithmetic that is used here.
    (result,) = loaded.processor.image_processor.post_process_instance_segmentation(
        SimpleNamespace(**{name: values[None] for name, values in best.items()}),
        threshold=-1.0,
        target_sizes=[tuple(size)],
    )
    masks = result["masks"].bool().cpu().numpy()
    scores, boxes = result["scores"].cpu().numpy(), result["boxes"].float().cpu().numpy()
    return [
        Instances(masks[phrases == each], scores[phrases == each], boxes[phrases == each])
        for each in range(count)
    ]


class PointedImages:
    """Images whose objects are pointed at; each is encoded once.

    Args:
        loaded: For the job "objects".
        sizes: (height, width) of each image.
        pixel_values: What `prepare_images` made of them.
        objects_per_batch: Boxes that go through the mask decoder at once.
    """

    @torch.inference_mode()
    def __init__(
        self,
        loaded: Loaded,
        sizes: Sequence[tuple[int, int]],
        pixel_values: Tensor,
        objects_per_batch: int = 32,
    ):
        self.loaded, self.objects_per_batch = loaded, objects_per_batch
        self.sizes = list(sizes)
        self.embeddings = loaded.model.get_image_embeddings(pixel_values)

    @classmethod
    def of(cls, loaded: Loaded, images: Sequence[np.ndarray]) -> "PointedImages":
        """Images (height, width, 3), encoded."""
        sizes = [(image.shape[0], image.shape[1]) for image in images]
        return cls(loaded, sizes, prepare_images(loaded, images))

    @torch.inference_mode()
    def by_boxes(self, index: int, boxes_xyxy: Sequence[Sequence[float]]) -> np.ndarray:
        """Masks (boxes, height, width) in one image, a single one for each box."""
        masks = [np.zeros((0, *self.sizes[index]), dtype=bool)]
        for start in range(0, len(boxes_xyxy), self.objects_per_batch):
            some = [list(map(float, box)) for box in boxes_xyxy[start:][: self.objects_per_batch]]
            outputs = self.decode(index, {"input_boxes": [some]}, multimask_output=False)
            masks.append(self.resize(index, outputs.pred_masks)[:, 0])
        return np.concatenate(masks)

    def clicker(self, index: int) -> Callable[[list["Click"]], np.ndarray]:
        """A function from the clicks on one object to its mask.

        Of the several masks for a first click it takes the one that the model scores best, and each
        further click goes with the mask before it, as SAM and SAM 2 do.
        """
        before: Tensor | None = None

        @torch.inference_mode()
        def predict(clicks: list["Click"]) -> np.ndarray:
            nonlocal before
            is_first = len(clicks) == 1
            prompts = {
                "input_points": [[[[float(click.x), float(click.y)] for click in clicks]]],
                "input_labels": [[[int(click.is_positive) for click in clicks]]],
            }
            outputs = self.decode(
                index,
                prompts,
                multimask_output=is_first,
                input_masks=None if is_first else before,
            )
            best = int(outputs.iou_scores[0, 0].argmax())
            logits = outputs.pred_masks[:1, :1, best : best + 1]
            before = logits[0].clamp(-32.0, 32.0)
            return self.resize(index, logits)[0, 0]

        return predict

    def decode(self, index: int, prompts: dict[str, Any], **options: Any) -> Any:
        """Raw outputs for prompts in one image."""
        inputs = self.loaded.processor(
            original_sizes=[list(self.sizes[index])], return_tensors="pt", **prompts
        )
        inputs = {name: inputs[name].to(self.loaded.device) for name in prompts}
        for name in inputs:
            if inputs[name].is_floating_point():
                inputs[name] = inputs[name].float()
        return self.loaded.model(
            image_embeddings=[level[index : index + 1] for level in self.embeddings],
            **inputs,
            **options,
        )

    def resize(self, index: int, logits: Tensor) -> np.ndarray:
        """Masks (objects, masks, height, width) out of logits: resized, then cut at 0."""
        size = [list(self.sizes[index])]
        (masks,) = self.loaded.processor.post_process_masks([logits[0].float().cpu()], size)
        return masks.numpy().astype(bool)


@torch.inference_mode()
def encode_phrases(loaded: Loaded, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Token features (phrases, length, channels) and which tokens (phrases, length) are valid."""
    inputs = loaded.to_device(loaded.processor(text=list(phrases), return_tensors="pt"))
    mask = inputs["attention_mask"]
    outputs = loaded.model.get_text_features(inputs["input_ids"], mask, return_dict=True)
    return outputs.pooler_output.float().cpu(), mask.bool().cpu()


@torch.inference_mode()
def encode_levels(loaded: Loaded, images: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
    """Of each image the three maps (channels, height, width) that the detector reads."""
    features = encode_images(loaded, images)
    names = ("fine", "middle", "coarse")
    return [
        {
            name: level[index].float().cpu()
            for name, level in zip(names, features.fpn_hidden_states, strict=False)
        }
        for index in range(len(images))
    ]
