"""`pipeline("promptable-concept-segmentation")`: phrases and exemplars to every instance.

`save_pretrained` copies this file beside the weights, as the code of the pipeline. So it imports
nothing else of the package.
"""

import json
import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel
from transformers.pipelines import PIPELINE_REGISTRY, Pipeline
from transformers.utils import ModelOutput

TASK = "promptable-concept-segmentation"

EXEMPLARS = ("input_boxes", "input_boxes_labels", "input_points", "input_points_labels")
PREPROCESS_PARAMETERS = ("text", *EXEMPLARS, "timeout")
FORWARD_PARAMETERS = ("threshold", "mask_threshold", "top_k", "prompts_per_batch")

VISUAL_LABEL = "visual"  # of what exemplars alone have found: the phrase that stands in for them
PADDING_LABEL = -10  # of a box or point that only fills up the batch
BOX_SIDES = ("xmin", "ymin", "xmax", "ymax")


class PromptableConceptSegmentationPipeline(Pipeline):
    """Every instance of each phrase, and of what looks like the exemplars, in images.

    An image is encoded once, whatever the number of its phrases.
    """

    model: Any
    processor: Any

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.processor is None:
            raise ValueError(f"The pipeline {TASK!r} needs a processor: pass processor=...")
        if self.model.config.model_type != "efficientsam3":
            raise ValueError(
                f"The pipeline {TASK!r} needs an EfficientSam3Model, not "
                f"{type(self.model).__name__}. For a tracker there is 'mask-generation'."
            )

    def __call__(self, inputs: Any, **kwargs) -> Any:
        """Find instances in one image or many.

        Args:
            inputs: A path, URL, PIL image or array; a dictionary of an image (`"image"`) and any of
                the prompts below, which then go before those of the call; or a list, generator or
                dataset of these.
            text: A phrase or several, for every image; or a list of such lists, one for each image
                of a list.
            input_boxes: Exemplar boxes (x1, y1, x2, y2) in pixels: a list for the single phrase, or
                for each phrase a list or None. Without text, they say alone what to find.
            input_boxes_labels: 1 for "like this", 0 for "unlike this"; all 1 if left out.
            input_points: Exemplar points (x, y), as for boxes.
            input_points_labels: As for boxes.
            threshold: Keep instances whose score lies above (default 0.5).
            mask_threshold: Probability above which a pixel belongs to a mask (default 0.5).
            top_k: Keep at most so many instances of an image, the best ones (default: all).
            prompts_per_batch: Prompts run at once (default 8); fewer take less memory.
            timeout: Seconds to wait for a URL.
            batch_size: Images run at once (default 1).
            num_workers: Processes that read and prepare images.

        Returns:
            For each image a list, best first, of dictionaries: `score`; `label`, the phrase; `box`
            with xmin, ymin, xmax and ymax in whole pixels; and `mask`, a PIL image of the original
            size, 255 on the instance and 0 elsewhere.
        """
        known = {*PREPROCESS_PARAMETERS, *FORWARD_PARAMETERS, "batch_size", "num_workers"}
        if unknown := sorted(set(kwargs) - known):
            raise TypeError(f"Unknown parameters {unknown}. There are {sorted(known)}.")
        if isinstance(inputs, tuple):
            inputs = list(inputs)
        if isinstance(inputs, list) and not inputs:
            return []
        text = kwargs.get("text")
        if isinstance(text, list | tuple) and any(isinstance(item, list | tuple) for item in text):
            inputs = give_each_its_phrases(inputs, kwargs.pop("text"))
        return super().__call__(inputs, **kwargs)

    def _sanitize_parameters(self, **kwargs) -> tuple[dict, dict, dict]:
        preprocess = {name: kwargs[name] for name in PREPROCESS_PARAMETERS if name in kwargs}
        forward = {name: kwargs[name] for name in FORWARD_PARAMETERS if name in kwargs}
        for name in ("threshold", "mask_threshold"):
            if isinstance(value := forward.get(name, 0.5), bool) or not isinstance(value, Real):
                raise ValueError(f"{name} must be a number from 0 to 1, not {value!r}.")
        return preprocess, forward, {}

    def preprocess(self, input_: Any, timeout: float | None = None, **prompts) -> dict[str, Any]:
        """Pixels of one image, and its prompts as tensors."""
        if isinstance(input_, Mapping):
            known = ("image", "text", *EXEMPLARS)
            if "image" not in input_ or set(input_) - set(known):
                raise ValueError(
                    f"A dictionary of an image and its prompts has keys of {list(known)}, and "
                    f"'image' must be there; this one has {sorted(input_)}."
                )
            prompts = {**prompts, **{name: input_[name] for name in input_ if name != "image"}}
            input_ = input_["image"]
        phrases, exemplars = list_prompts(**prompts)
        inputs = dict(self.processor(images=open_image(input_, timeout), text=phrases, **exemplars))
        return {
            "pixel_values": inputs.pop("pixel_values"),
            "prompts": {
                "size": tuple(inputs.pop("original_sizes")[0].tolist()),
                "labels": [VISUAL_LABEL if phrase is None else phrase for phrase in phrases],
                "tensors": inputs,
            },
        }

    def _forward(
        self,
        input_tensors: dict[str, Any],
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        top_k: int | None = None,
        prompts_per_batch: int = 8,
    ) -> dict[str, Any]:
        """Instances of each image, with masks of its size, best first."""
        # A batch comes as lists, an image alone as it left `preprocess`.
        is_batch = isinstance(input_tensors["prompts"], list)
        images = input_tensors["prompts"] if is_batch else [input_tensors["prompts"]]
        if prompts_per_batch < 1 or (top_k is not None and top_k < 1):
            raise ValueError(
                f"prompts_per_batch={prompts_per_batch} and top_k={top_k} must be at least 1."
            )
        features = self.model.get_vision_features(input_tensors["pixel_values"])
        prompts = join_prompts([image["tensors"] for image in images])
        counts = torch.tensor([len(image["labels"]) for image in images])
        image_indices = torch.arange(len(images)).repeat_interleave(counts).to(self.device)
        candidates = []
        for start in range(0, len(image_indices), prompts_per_batch):
            some = slice(start, start + prompts_per_batch)
            outputs = self.model(
                vision_embeds=features,
                # Without indices the prompts of a single image share its maps instead of copying.
                image_indices=image_indices[some] if len(images) > 1 else None,
                **{name: tensor[some] for name, tensor in prompts.items()},
            )
            scores = calibrated_scores(outputs, self.processor.image_processor)
            candidates.append(select_candidates(outputs, scores, threshold, start))
        joined = {name: torch.cat([one[name] for one in candidates]) for name in candidates[0]}
        found, labels = [], []
        first_prompt = 0
        for index, image in enumerate(images):
            mine = image_indices[joined["prompt"]] == index
            best = {name: tensor[mine] for name, tensor in joined.items()}
            order = best.pop("score").sort(descending=True, stable=True).indices[:top_k]
            prompt = best.pop("prompt")[order] - first_prompt
            (instances,) = self.processor.post_process_instance_segmentation(
                SimpleNamespace(**{name: tensor[order][None] for name, tensor in best.items()}),
                threshold=-1.0,  # each has passed it already
                mask_threshold=mask_threshold,
                target_sizes=[image["size"]],
            )
            # Image by image to the CPU: masks of all images at once may not fit the device.
            found.append({name: tensor.cpu() for name, tensor in instances.items()})
            labels.append([image["labels"][number] for number in prompt.tolist()])
            first_prompt += len(image["labels"])
        result = {"found": found, "labels": labels}
        return result if is_batch else {name: values[0] for name, values in result.items()}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        """Instances of one image as Python and PIL have them."""
        found = model_outputs["found"]
        return [
            {
                "score": score,
                "label": label,
                "box": dict(zip(BOX_SIDES, box, strict=True)),
                "mask": Image.fromarray(mask.astype(np.uint8) * 255),
            }
            for score, label, box, mask in zip(
                found["scores"].tolist(),
                model_outputs["labels"],
                found["boxes"].int().tolist(),
                found["masks"].numpy(),
                strict=True,
            )
        ]

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """Write a folder that loads again by itself: weights, processor, tokenizer and this code.

        Args:
            save_directory: Folder to write.
            kwargs: As for `save_pretrained` of the model.
        """
        save_directory = str(save_directory)  # a processor that is also pushed takes no other
        # The processor writes both, in one file; transformers would write them in files of old.
        tokenizer, image_processor = self.tokenizer, self.image_processor
        self.tokenizer = self.image_processor = None
        try:
            super().save_pretrained(save_directory, **kwargs)
        finally:
            self.tokenizer, self.image_processor = tokenizer, image_processor
        self.processor.save_pretrained(save_directory, **kwargs)


def write_pipeline(folder: str | os.PathLike) -> Path:
    """Write the code of the pipeline into a folder of weights, as `save_pretrained` does.

    For folders that hold more than the pipeline's model, such as those of all tasks.

    Args:
        folder: What `save_pretrained` of a model or `zoo.save` wrote.

    Returns:
        The file with the code.
    """
    config_file = Path(folder) / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that save_pretrained wrote.")
    config = json.loads(config_file.read_text())
    code = Path(__file__)
    implementation = f"{code.stem}.{PromptableConceptSegmentationPipeline.__name__}"
    config["custom_pipelines"] = {
        TASK: {"impl": implementation, "pt": [AutoModel.__name__], "type": "multimodal"}
    }
    config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return Path(shutil.copyfile(code, Path(folder) / code.name))


def give_each_its_phrases(images: Any, phrases: Sequence[Any]) -> list[dict[str, Any]]:
    """A list of images and a list of phrases for each of them as dictionaries."""
    if not isinstance(images, list) or len(images) != len(phrases):
        count = len(images) if isinstance(images, list) else "something else than a list of"
        raise ValueError(
            f"{len(phrases)} lists of phrases do not fit {count} images. Give a flat list for "
            "phrases that go with every image."
        )
    return [
        {**(image if isinstance(image, Mapping) else {"image": image}), "text": of_image}
        for image, of_image in zip(images, phrases, strict=True)
    ]


def open_image(source: Any, timeout: float | None = None) -> Any:
    """An image of any kind as the processor takes it, upright."""
    if isinstance(source, np.ndarray | Tensor):
        if source.ndim not in (2, 3):
            raise ValueError(
                f"An image is (height, width) or has channels besides, not {tuple(source.shape)}. "
                "Give several images as a list."
            )
        return source
    if isinstance(source, str | os.PathLike):
        return read_image(source, timeout)
    if not isinstance(source, Image.Image):
        raise TypeError(
            "An image is a path, a URL, a PIL image, an array or a tensor, not "
            f"{type(source).__name__}."
        )
    return ImageOps.exif_transpose(source)


def read_image(source: str | os.PathLike, timeout: float | None) -> Image.Image:
    """The image at a path or URL, upright."""
    file: Any = source
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        try:
            request = Request(source, headers={"User-Agent": "transformers"})
            with urlopen(request, timeout=timeout) as answer:
                file = BytesIO(answer.read())
        except OSError as error:
            raise ValueError(f"No image came from {source[:200]}: {error}.") from error
    elif not os.path.isfile(source):
        raise ValueError(
            f"There is no image {str(source)[:200]!r}. Give a path, a URL or an image."
        )
    try:
        with Image.open(file) as image:
            return ImageOps.exif_transpose(image)
    except OSError as error:
        raise ValueError(
            f"{str(source)[:200]!r} is not an image that can be read: {error}."
        ) from error


def list_prompts(
    text: str | Sequence[str | None] | None = None, **exemplars: Any
) -> tuple[list[str | None], dict[str, list]]:
    """The prompts of one image, one by one: phrases, and exemplars of each.

    >>> list_prompts("car", input_boxes=[[1, 2, 3, 4]])
    (['car'], {'input_boxes': [[[1, 2, 3, 4]]]})
    """
    given = {name: per_prompt(name, value) for name, value in exemplars.items()}
    given = {name: value for name, value in given.items() if value is not None}
    for name in given:
        if name.removesuffix("_labels") not in given:
            raise ValueError(f"{name} needs {name.removesuffix('_labels')} to go with.")
    if text is None and not given:
        raise ValueError(
            "There is nothing to look for: give text=, input_boxes= or input_points=, alone or "
            "together."
        )
    phrases: list[Any] = [text]
    if isinstance(text, Iterable) and not isinstance(text, str):
        phrases = list(text)
    if not all(isinstance(phrase, str | None) for phrase in phrases):
        raise ValueError(f"text must be a phrase or a list of phrases, not {text!r}.")
    if not phrases:
        raise ValueError(
            "The list of phrases is empty. To prompt with exemplars alone, leave it out."
        )
    counts = {name: len(value) for name, value in given.items()}
    if len(phrases) == 1 and (text is None or isinstance(text, str)) and counts:
        phrases *= max(counts.values())
    wrong = {name: count for name, count in counts.items() if count != len(phrases)}
    if wrong:
        listing = ", ".join(f"{name} for {count}" for name, count in wrong.items())
        raise ValueError(
            f"{listing} do not fit {len(phrases)} phrases: give a list, or None, for each phrase."
        )
    return phrases, given


def per_prompt(name: str, nested: Any) -> list | None:
    """Exemplars, or their labels, nested as prompt, exemplar(, coordinates)."""
    nested = to_lists(nested)
    if not nested:
        return None
    wanted = 2 if name.endswith("_labels") else 3
    given = depth(nested)
    if given == wanted - 1:
        return [nested]
    if given != wanted:
        example = "[[x1, y1, x2, y2]]" if "boxes" in name else "[[x, y]]"
        example = "[1]" if wanted == 2 else example
        raise ValueError(
            f"{name} must be a list for the single phrase, as {example}, or a list of such lists, "
            f"one for each phrase; not {nested!r}."
        )
    return list(nested)


def to_lists(nested: Any) -> Any:
    """Arrays and tensors, also those in lists, as lists."""
    if isinstance(nested, list | tuple):
        return [to_lists(item) for item in nested]
    return nested.tolist() if hasattr(nested, "tolist") else nested


def depth(nested: Any) -> int:
    """How deep lists are nested: 0 for a number or None."""
    if not isinstance(nested, list | tuple):
        return 0
    return 1 + max((depth(item) for item in nested), default=0)


def join_prompts(images: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Prompts of several images as one batch; exemplars are filled up to the longest list."""
    joined = {
        name: torch.cat([image[name] for image in images])
        for name in ("input_ids", "attention_mask")
    }
    for kind in ("input_boxes", "input_points"):
        labels = f"{kind}_labels"
        longest = max((image[kind].shape[1] for image in images if kind in image), default=0)
        if not longest:
            continue
        rows, row_labels = [], []
        for image in images:
            count = len(image["input_ids"])
            width = 4 if kind == "input_boxes" else 2
            device = image["input_ids"].device
            given = image.get(kind, torch.zeros(count, 0, width, device=device))
            given_labels = image.get(labels, torch.zeros(count, 0, dtype=torch.long, device=device))
            missing = longest - given.shape[1]
            rows.append(F.pad(given, (0, 0, 0, missing), value=0.5))
            row_labels.append(F.pad(given_labels, (0, missing), value=PADDING_LABEL))
        joined[kind], joined[labels] = torch.cat(rows), torch.cat(row_labels)
    return joined


def calibrated_scores(outputs: ModelOutput, image_processor: Any) -> Tensor:
    """(prompts, queries): scores, presence included, as the image processor gives them."""
    scores = outputs.pred_logits.sigmoid() * outputs.presence_logits.sigmoid()
    temperature, bias = image_processor.score_temperature, image_processor.score_bias
    if temperature == 1 and bias == 0:
        return scores
    return (scores.float().logit(eps=1e-7) / temperature + bias).sigmoid()


def select_candidates(
    outputs: ModelOutput, scores: Tensor, threshold: float, first_prompt: int
) -> dict[str, Tensor]:
    """Predictions above the threshold, all prompts in a row.

    Args:
        outputs: What the model returned for some prompts.
        scores: (prompts, queries) of these.
        threshold: Lowest score.
        first_prompt: Number of the first of these prompts.
    """
    presence = outputs.presence_logits.expand_as(outputs.pred_logits)
    prompts, queries = (scores > threshold).nonzero(as_tuple=True)
    return {
        "prompt": prompts + first_prompt,
        "score": scores[prompts, queries],
        "pred_logits": outputs.pred_logits[prompts, queries],
        "presence_logits": presence[prompts, queries],
        "pred_boxes": outputs.pred_boxes[prompts, queries],
        "pred_masks": outputs.pred_masks[prompts, queries],
    }


# Here and not in auto.py: this file may be the one that makes transformers load its pipelines, and
# a pipeline that came out of a folder must know what to write when it is saved again.
PromptableConceptSegmentationPipeline._registered_impl = {  # pyright: ignore  of transformers
    TASK: {"impl": PromptableConceptSegmentationPipeline, "pt": (AutoModel,), "type": "multimodal"}
}
if TASK not in PIPELINE_REGISTRY.supported_tasks:
    PIPELINE_REGISTRY.register_pipeline(
        TASK, PromptableConceptSegmentationPipeline, pt_model=AutoModel, type="multimodal"
    )
