"""What a concept model should find, from the labels of a batch.

Prompts have different numbers of instances. Instead of being padded, the instances of all prompts
stand in one row, and `prompt_of` says whose each of them is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Label = Mapping[str, Any]


@dataclass
class ConceptTargets:
    """The instances of all prompts in one row, and what is known of each prompt.

    Args:
        boxes: (instances, 4) as (cx, cy, w, h) in [0, 1].
        masks: Boolean (instances, height, width), or None where there are only boxes.
        is_crowd: (instances,) groups whose members were not told apart.
        prompt_of: (instances,) number of the prompt of each.
        per_prompt: How many of them each prompt has; they stand in the order of prompts.
        is_exhaustive: (prompts,) whether there is nothing more that the prompt names.
    """

    boxes: Tensor
    masks: Tensor | None
    is_crowd: Tensor
    prompt_of: Tensor
    per_prompt: list[int]
    is_exhaustive: Tensor

    @property
    def has_instance(self) -> Tensor:
        """(prompts,) whether the prompt names anything."""
        return torch.tensor([n > 0 for n in self.per_prompt], device=self.boxes.device)

    def most(self, values: Tensor) -> Tensor:
        """The largest value (..., prompts, queries) of the instances (..., instances, queries).

        0 where a prompt has no instance.
        """
        shape = (*values.shape[:-2], len(self.per_prompt), values.shape[-1])
        prompt_of = self.prompt_of[:, None].expand_as(values)
        return values.new_zeros(shape).scatter_reduce_(-2, prompt_of, values, "amax")


@torch.compiler.disable  # shapes change with every batch
def pack_labels(labels: Sequence[Label], num_prompts: int, device: torch.device) -> ConceptTargets:
    """Targets from labels as `ImageCollator` makes them, one for each prompt.

    A label has `boxes`; what it may have is `masks`, `is_crowd` (else none is) and `is_exhaustive`
    (else it is). All other keys are for people to read.
    """
    check_labels(labels, num_prompts)
    boxes = [label["boxes"].to(device, torch.float32) for label in labels]
    per_prompt = [len(of_prompt) for of_prompt in boxes]
    masks = None
    if all(label.get("masks") is not None for label in labels):
        masks = torch.cat([label["masks"].to(device) for label in labels]).bool()
    crowds = [
        torch.as_tensor(label.get("is_crowd", [False] * count), device=device)
        for label, count in zip(labels, per_prompt, strict=True)
    ]
    exhaustive = [torch.as_tensor(label.get("is_exhaustive", True)) for label in labels]
    prompt_of = [number for number, count in enumerate(per_prompt) for _ in range(count)]
    return ConceptTargets(
        boxes=torch.cat(boxes),
        masks=masks,
        is_crowd=torch.cat(crowds).bool(),
        prompt_of=torch.tensor(prompt_of, dtype=torch.long, device=device),
        per_prompt=per_prompt,
        is_exhaustive=torch.stack([each.to(device) for each in exhaustive]).bool(),
    )


def check_labels(labels: Sequence[Label], num_prompts: int) -> None:
    """Raise for what is no list of labels, one for each prompt."""
    if isinstance(labels, Tensor | Mapping | str) or not all(
        isinstance(label, Mapping) and isinstance(label.get("boxes"), Tensor) for label in labels
    ):
        raise ValueError(
            "labels must be a list with one dictionary for each prompt, which holds `boxes` and "
            "`masks` as tensors, as ImageCollator makes them."
        )
    if len(labels) != num_prompts:
        raise ValueError(
            f"There are {len(labels)} labels for {num_prompts} prompts: each prompt needs one, in "
            "the order of prompts."
        )
    for number, label in enumerate(labels):
        boxes, masks, is_crowd = label["boxes"], label.get("masks"), label.get("is_crowd")
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(
                f"boxes of label {number} must be (instances, 4) as (cx, cy, w, h) in [0, 1], not "
                f"{tuple(boxes.shape)}."
            )
        if masks is not None and (masks.ndim != 3 or len(masks) != len(boxes)):
            raise ValueError(
                f"masks of label {number} must be ({len(boxes)}, height, width) as it has "
                f"{len(boxes)} boxes, not {tuple(masks.shape)}."
            )
        if is_crowd is not None and len(is_crowd) != len(boxes):
            raise ValueError(
                f"is_crowd of label {number} has {len(is_crowd)} entries for {len(boxes)} boxes."
            )
    sizes = {tuple(label["masks"].shape[1:]) for label in labels if label.get("masks") is not None}
    if len(sizes) > 1:
        raise ValueError(
            f"Masks of {len(sizes)} sizes, such as {sorted(sizes)[:2]}, do not fit one batch: give "
            "them one size, as ImageCollator(processor, mask_size=(288, 288)) does."
        )


def count_labels(labels: Sequence[Label]) -> dict[str, Tensor]:
    """What the terms of a loss are means over: `boxes` that are no crowds, and `prompts`.

    Add them up over processes and over the micro-batches of a step, and pass them as `loss_counts`:
    then the losses of the parts add up to the loss of the whole.
    """
    targets = pack_labels(labels, len(labels), labels[0]["boxes"].device)
    prompts = torch.tensor(float(len(labels)), device=targets.boxes.device)
    return {"boxes": (~targets.is_crowd).sum().float(), "prompts": prompts}
