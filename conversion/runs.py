"""Runs the prompts of a golden case through our models, and keeps what the case has values for."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoProcessor

from efficientsam3_hf import (
    EfficientSam3Model,
    EfficientSam3TextModel,
    EfficientSam3TrackerModel,
)

from .golden import GoldenCase

LOGIT_BOUND = 32  # to which the reference clamps the masks of its point-and-box predictor
HALF_UNIT = 6e-8  # half of float32's unit in the last place, relative


@dataclass(frozen=True)
class Kept:
    """Instances above the score threshold.

    Args:
        scores: Of all queries.
        indices: Of the queries kept.
        sampled: Golden names to what the case stores of scores, boxes and masks.
        size: (height, width) of the image, in which boxes are measured.
    """

    scores: Tensor
    indices: Tensor
    sampled: dict[str, Tensor]
    size: tuple[int, int]

    def scale(self, name: str, values: Tensor) -> Tensor:
        """Boxes as shares of the image, so that one tolerance is for all."""
        if not name.endswith(".boxes"):
            return values
        height, width = self.size
        return values / values.new_tensor([width, height, width, height])


@dataclass
class Run:
    """Outputs of one run.

    Args:
        case: What is to be run.
        stir: Applied to pixels before a model sees them.
        outputs: Golden names to whole outputs.
        kept: `"proc"` and `"proc2"` to their instances.
        wanted: Names of the outputs that are of interest; None for all. What they do not need is
            not run.
    """

    case: GoldenCase
    stir: Callable[[Tensor], Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    wanted: frozenset[str] | None = None

    def wants(self, prefix: str) -> bool:
        """Whether any output of interest begins so."""
        return self.wanted is None or any(name.startswith(prefix) for name in self.wanted)

    def keep(self, name: str, tensor: Tensor | None) -> None:
        """Take over an output, if the case has values for it."""
        if tensor is not None and name in self.case:
            self.outputs[name] = tensor.clone()


def stir_rounding(pixels: Tensor, seed: int) -> Tensor:
    """Pixels moved by half a unit in the last place, up or down at random."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, pixels.shape, generator=generator) * 2 - 1
    return (pixels.double() * (1 + HALF_UNIT * signs)).to(pixels.dtype)


def run_concepts(folder: Path, run: Run) -> None:
    """Everything that the concept model computes in a case."""
    model = EfficientSam3Model.from_pretrained(folder).eval()
    processor = AutoProcessor.from_pretrained(folder)
    meta = run.case.meta

    with record_modules(model) as seen:
        vision = model.get_vision_features(run.stir(run.case.pixel_values()))
    keep_vision(run, model, seen, vision)
    inputs = processor(text=meta["texts"])
    run.keep("text.input_ids", inputs["input_ids"])
    run.keep("text.padding_mask", inputs["attention_mask"] == 0)
    with record_modules(model) as seen:
        text = model.get_text_features(**inputs)
    embeds = seen["token_embedding"][1]
    if isinstance(model.text_encoder, EfficientSam3TextModel):  # which the reference adds here
        embeds = embeds + model.text_encoder.position_rows(embeds.shape[1])
    run.keep("text.input_embeds_LBC", embeds.transpose(0, 1))
    run.keep("text.features_LBC", text.pooler_output.transpose(0, 1))

    for tag, prompt in meta["prompts"].items():
        if not run.wants(f"{tag}."):
            continue
        inputs = processor(text=prompt["text"]) | exemplars_of(prompt)
        with record_modules(model) as seen:
            output = model(vision_embeds=vision, **inputs)
        keep_prompt(run, tag, seen, output)
    if "proc" in meta and run.wants("proc"):
        run_photograph(model, processor, run)


@contextlib.contextmanager
def record_modules(model: EfficientSam3Model) -> Iterator[dict[str, Any]]:
    """What some modules got and gave in the meantime, under their names."""
    names = ["vision_encoder.backbone", "vision_encoder.backbone.head", "geometry_encoder"]
    names += ["detr_encoder", "detr_decoder", "mask_decoder.pixel_decoder"]
    names += ["detr_decoder.presence_layer_norm"]
    seen: dict[str, Any] = {}
    modules = dict(model.named_modules())

    def note(name: str) -> Callable:
        def hook(module: nn.Module, inputs: tuple, output: Any) -> None:
            seen[name] = (inputs, output)

        return hook

    handles = [modules[name].register_forward_hook(note(name)) for name in names if name in modules]
    table = model.text_encoder.get_input_embeddings()
    handles.append(table.register_forward_hook(note("token_embedding")))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def keep_vision(run: Run, model: EfficientSam3Model, seen: dict[str, Any], vision: Any) -> None:
    """Trunk, head and necks."""
    if "vision_encoder.backbone.head" in seen:
        (trunk_map, *_), projected = seen["vision_encoder.backbone.head"]
        run.keep("trunk.student_feature", trunk_map)
        run.keep("trunk.head_out_before_resize", projected)
    tokens = seen["vision_encoder.backbone"][1].last_hidden_state
    grid = model.config.image_size // model.config.vision_config.backbone_config.patch_size
    run.keep("trunk.out", tokens.transpose(1, 2).unflatten(2, (grid, grid)))
    for level in range(3):  # the reference computes a fourth, which nothing reads
        run.keep(f"neck.sam3.{level}", vision.fpn_hidden_states[level])
    run.keep("neck.pos.2", vision.fpn_position_encoding[2])


def exemplars_of(prompt: dict[str, Any]) -> dict[str, Tensor]:
    """Exemplar boxes and points of one prompt, which a case has in [0, 1] already."""
    inputs = {}
    for kind, place in (("boxes", "box_cxcywh"), ("points", "point_xy")):
        if kind in prompt:
            exemplars = prompt[kind]
            labels = [int(exemplar["positive"]) for exemplar in exemplars]
            inputs[f"input_{kind}"] = torch.tensor([[exemplar[place] for exemplar in exemplars]])
            inputs[f"input_{kind}_labels"] = torch.tensor([labels])
    return inputs


def keep_prompt(run: Run, tag: str, seen: dict[str, Any], output: Any) -> None:
    """What came of one concept prompt, on the way and in the end."""
    if "geometry_encoder" in seen:
        tokens, is_valid = seen["geometry_encoder"][1]
        run.keep(f"{tag}.geometry_out", tokens.transpose(0, 1))
        run.keep(f"{tag}.geometry_mask", ~is_valid)
    run.keep(f"{tag}.encoder_memory", seen["detr_encoder"][1].last_hidden_state.transpose(0, 1))
    decoded = seen["detr_decoder"][1]
    run.keep(f"{tag}.decoder_hs", decoded.intermediate_hidden_states.transpose(1, 2))
    run.keep(f"{tag}.decoder_reference_boxes", decoded.reference_boxes.transpose(1, 2))
    run.keep(f"{tag}.decoder_presence", decoded.presence_logits)
    run.keep(f"{tag}.decoder_presence_feats", seen["detr_decoder.presence_layer_norm"][0][0])
    run.keep(f"{tag}.pixel_decoder_out", seen["mask_decoder.pixel_decoder"][1])
    run.keep(f"{tag}.pred_logits", output.pred_logits[..., None])
    run.keep(f"{tag}.presence_logit_dec", output.presence_logits)
    run.keep(f"{tag}.pred_boxes", to_cxcywh(output.pred_boxes))
    run.keep(f"{tag}.pred_boxes_xyxy", output.pred_boxes)
    run.keep(f"{tag}.pred_masks", output.pred_masks)
    run.keep(f"{tag}.semantic_seg", output.semantic_seg)


def to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    corner, opposite = boxes_xyxy.split(2, dim=-1)
    return torch.cat([(corner + opposite) / 2, opposite - corner], dim=-1)


def run_photograph(model: EfficientSam3Model, processor: Any, run: Run) -> None:
    """A phrase on a photograph, from pixels to instances; then the same with a box."""
    meta = run.case.meta
    image = run.case.photograph(meta["proc"]["image"])
    pixel_values = processor(images=image)["pixel_values"]
    run.keep("proc.pixel_values", pixel_values)
    vision = model.get_vision_features(run.stir(pixel_values))
    for tag in ("proc", "proc2"):
        if tag in meta:
            inputs = processor(text=meta[tag]["text"]) | exemplars_of(meta[tag])
            output = model(vision_embeds=vision, **inputs)
            keep_instances(run, tag, output, (image.height, image.width))


def keep_instances(run: Run, tag: str, output: Any, size: tuple[int, int]) -> None:
    """Scores of all queries, and the instances above the threshold."""
    scores = (output.pred_logits.sigmoid() * output.presence_logits.sigmoid())[0]
    run.keep(f"{tag}.probs", scores[None])
    run.keep(f"{tag}.pred_boxes", to_cxcywh(output.pred_boxes))
    indices = (scores > run.case.meta[tag]["score_threshold"]).nonzero().flatten()
    masks = F.interpolate(
        output.pred_masks[0, indices, None], size, mode="bilinear", align_corners=False
    ).sigmoid()
    wanted = {
        f"{tag}.scores": scores[indices],
        f"{tag}.boxes": output.pred_boxes[0, indices],
        f"{tag}.masks_prob": masks,
        f"{tag}.masks": masks,  # binary in the case: thresholded when compared
    }
    is_same_count = len(indices) == len(run.case.values(f"{tag}.scores"))
    sampled = {
        name: run.case.sample(name, values)
        for name, values in wanted.items()
        if is_same_count and name in run.case
    }
    run.kept[tag] = Kept(scores, indices, sampled, size)


def run_tracker(folder: Path, run: Run) -> None:
    """The tracker's neck; points, boxes and masks on the photograph."""
    model = EfficientSam3TrackerModel.from_pretrained(folder).eval()
    if run.wants("neck.sam2."):
        vision = model.vision_encoder(run.stir(run.case.pixel_values()))
        for level, features in enumerate(vision.fpn_hidden_states):
            run.keep(f"neck.sam2.{level}", features)
    about = run.case.meta.get("inst")
    if not about or not run.wants("inst."):
        return
    image = run.case.photograph(about["image"])
    pixels = AutoProcessor.from_pretrained(folder)(images=image)["pixel_values"]
    embeddings = model.get_image_embeddings(run.stir(pixels))
    for level, features in enumerate(embeddings):
        without_memory = (
            features - model.no_memory_embedding.view(1, -1, 1, 1) if level == 2 else features
        )
        run.keep(f"inst.features_after_conv_s.{level}", without_memory)

    scale = torch.tensor([model.config.image_size / side for side in image.size])
    first_mask = None
    for name, prompt in about["cases"].items():
        inputs = clicks_of(prompt, scale, first_mask)
        output = model(
            image_embeddings=embeddings, multimask_output=prompt["multimask_output"], **inputs
        )
        masks = output.pred_masks[0].clamp(-LOGIT_BOUND, LOGIT_BOUND)  # (objects, masks, h, w)
        scores = output.iou_scores[0]
        if name == "point":
            first_mask = masks[:, :1]
        resized = F.interpolate(
            masks, (image.height, image.width), mode="bilinear", align_corners=False
        )
        several = len(masks) > 1
        if "input_masks" in inputs:
            run.keep(f"inst.{name}.mask_input", inputs["input_masks"][0])
        run.keep(f"inst.{name}.low_res", masks if several else masks[0])
        run.keep(f"inst.{name}.iou", scores if several else scores[0])
        run.keep(f"inst.{name}.masks_logits", resized if several else resized[0])


def clicks_of(prompt: dict[str, Any], scale: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Points, boxes and mask of one prompt, in the model's pixels."""
    inputs = {}
    if "point_coords" in prompt:
        inputs["input_points"] = (torch.tensor(prompt["point_coords"]) * scale)[None, None]
        inputs["input_labels"] = torch.tensor(prompt["point_labels"])[None, None]
    if "box" in prompt:
        boxes = torch.tensor(prompt["box"]).view(-1, 4)
        inputs["input_boxes"] = (boxes * scale.repeat(2))[None]
    if "mask_input" in prompt:
        if mask is None:
            raise ValueError("A prompt refines the mask of the prompt 'point', which comes later.")
        inputs["input_masks"] = mask
    return inputs
