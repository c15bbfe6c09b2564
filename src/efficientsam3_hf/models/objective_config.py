"""What training a concept model asks for: weights of terms, and how queries are matched."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from huggingface_hub.dataclasses import strict


@strict
@dataclass
class ObjectiveConfig:
    """Weights of the terms of SAM 3's objective, and how each of them is computed.

    A term whose weight is 0 is not computed. Defaults are SAM 3's.

    Args:
        class_weight: Of the scores of queries, IoU-aware binary cross entropy.
        presence_weight: Of whether the phrase names anything in the image.
        l1_weight: Of the distance of boxes as (cx, cy, w, h).
        giou_weight: Of the generalised IoU of boxes.
        mask_weight: Of the focal loss of masks.
        dice_weight: Of the Dice loss of masks.
        semantic_weight: Of the cross entropy of the map of all instances together.
        semantic_dice_weight: Of its Dice loss.
        auxiliary_weight: Of all terms of each decoder layer before the last, beside their own.
        one_to_many_weight: Of a second group of queries that do without self-attention, beside the
            terms' own. The group is there in training only.
        class_cost: Of the scores when queries are matched to instances.
        l1_cost: Of boxes then, as above.
        giou_cost: Of boxes then, as above.
        class_target: What the score of a matched query is to reach: `"iou"`, which grows with the
            score and with the overlap of its box, or `"one"`, to start from scratch with.
        positive_weight: Of matched queries beside others in the classification term.
        class_queries: That term is a mean over so many queries where a model has fewer.
        mask_points: Points of a mask that its terms look at, most of them where the prediction is
            in doubt, drawn from torch's global generator; None for every pixel.
    """

    class_weight: float | int = 20.0
    presence_weight: float | int = 20.0
    l1_weight: float | int = 5.0
    giou_weight: float | int = 2.0
    mask_weight: float | int = 200.0
    dice_weight: float | int = 10.0
    semantic_weight: float | int = 20.0
    semantic_dice_weight: float | int = 30.0
    auxiliary_weight: float | int = 1.0
    one_to_many_weight: float | int = 2.0
    class_cost: float | int = 2.0
    l1_cost: float | int = 5.0
    giou_cost: float | int = 2.0
    class_target: Literal["iou", "one"] = "iou"
    positive_weight: float | int = 10.0
    class_queries: int = 200
    mask_points: int | None = 12544

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> "ObjectiveConfig":
        """The defaults but for some values; a name that is none of a field is an error."""
        values = values or {}
        names = [field.name for field in fields(cls)]
        unknown = [name for name in values if name not in names]
        if unknown:
            raise ValueError(
                f"The objective has no field {unknown[0]!r}. Its fields: {', '.join(names)}."
            )
        objective = cls(**values)
        for name in names:
            value = getattr(objective, name)
            least = 1 if name in ("class_queries", "mask_points") else 0
            if isinstance(value, int | float) and not value >= least:
                raise ValueError(f"objective.{name}={value}: it must be {least} or more.")
        return objective

    def weights(self) -> dict[str, float]:
        """By what each term is multiplied, by its name in `loss_dict`."""
        scores_and_boxes = {
            "class": self.class_weight,
            "l1": self.l1_weight,
            "giou": self.giou_weight,
        }
        of_layer = {"presence": self.presence_weight, **scores_and_boxes} | {
            f"one_to_many_{name}": self.one_to_many_weight * weight
            for name, weight in scores_and_boxes.items()
        }
        return {
            **of_layer,
            "mask": self.mask_weight,
            "dice": self.dice_weight,
            "semantic": self.semantic_weight,
            "semantic_dice": self.semantic_dice_weight,
            **{f"auxiliary_{name}": self.auxiliary_weight * w for name, w in of_layer.items()},
        }
