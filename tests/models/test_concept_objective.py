"""The terms of the objective, against plain loops in float64, and what they leave alone."""

import copy
import math
from typing import Any

import pytest
import torch
from objective_cases import (
    COUNTS,
    CROWDS,
    LAYERS,
    NOT_EXHAUSTIVE,
    QUERIES,
    SIDE,
    plain_iou,
    plain_one_to_many,
    random_boxes,
    random_labels,
    random_predictions,
)
from torch import Tensor

from efficientsam3_hf.models.concept_objective import (
    ConceptPredictions,
    concept_losses,
    weighted_sum,
)
from efficientsam3_hf.models.concept_targets import ConceptTargets, count_labels, pack_labels
from efficientsam3_hf.models.mask_objective import (
    all_pixels,
    dice_loss,
    doubtful_points,
    focal_loss,
)
from efficientsam3_hf.models.matching import match_one_to_one
from efficientsam3_hf.models.objective_config import ObjectiveConfig

CPU = torch.device("cpu")
EVERY_PIXEL = ObjectiveConfig(mask_points=None, class_queries=10)


def random_case(seed: int) -> tuple[ConceptPredictions, list[dict[str, Any]]]:
    generator = torch.Generator().manual_seed(seed)
    return random_predictions(generator), random_labels(generator)


def terms_of(
    predictions: ConceptPredictions,
    labels: list[dict[str, Any]],
    objective: ObjectiveConfig = EVERY_PIXEL,
    counts: dict[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    return concept_losses(predictions, pack_labels(labels, len(labels), CPU), objective, counts)


def entropy(logit: float, target: float) -> float:
    """Binary cross entropy."""
    p = 1 / (1 + math.exp(-logit))
    return -target * math.log(p) - (1 - target) * math.log(1 - p)


def plain_terms(
    predictions: ConceptPredictions, labels: list[dict[str, Any]], class_target: str
) -> dict[str, float]:
    """Every term by loops over layers, prompts, queries and instances."""
    targets = pack_labels(labels, len(labels), CPU)
    num_boxes = sum(int((~label["is_crowd"]).sum()) for label in labels)
    terms: dict[str, float] = {}

    def add(name: str, layer: int, value: float) -> None:
        name = name if layer == LAYERS - 1 else f"auxiliary_{name}"
        terms[name] = terms.get(name, 0.0) + value

    for group, prefix in enumerate(("", "one_to_many_")):
        logits, boxes = predictions.logits[group], predictions.boxes[group]
        query_of = match_one_to_one(logits, boxes, targets, EVERY_PIXEL)
        many = plain_one_to_many(logits[-1], boxes[-1], targets, 0.4)
        for layer in range(LAYERS):
            matched = {
                (int(targets.prompt_of[instance]), int(query)): instance
                for instance, query in enumerate(query_of[layer])
                if query >= 0
            }
            if group == 1 and layer == LAYERS - 1:
                matched = {
                    (prompt, query): int(many[prompt, query])
                    for prompt, query in (many >= 0).nonzero().tolist()
                }
            add_boxes_and_scores(
                lambda name, value, prefix=prefix, layer=layer: add(prefix + name, layer, value),
                logits[layer].double(),
                boxes[layer].double(),
                matched,
                labels,
                targets,
                class_target,
                num_boxes,
            )
            if group == 0:
                for prompt, label in enumerate(labels):
                    known = len(label["boxes"]) > 0 or bool(label["is_exhaustive"])
                    wanted = float(len(label["boxes"]) > 0)
                    error = entropy(predictions.presence[layer, prompt].item(), wanted)
                    add("presence", layer, 0.5 * error * known / len(labels))
            if group == 0 and layer == LAYERS - 1:
                add_masks(terms, predictions.masks.double(), matched, targets, num_boxes)
    add_semantic(terms, predictions.semantic.double(), labels)
    return terms


def add_boxes_and_scores(
    add: Any,
    logits: Tensor,
    boxes: Tensor,
    matched: dict[tuple[int, int], int],
    labels: list[dict[str, Any]],
    targets: ConceptTargets,
    class_target: str,
    num_boxes: int,
) -> None:
    add("l1", 0.0)
    add("giou", 0.0)
    add("class", 0.0)
    for prompt, label in enumerate(labels):
        for query in range(QUERIES):
            logit, box = logits[prompt, query].item(), boxes[prompt, query].tolist()
            p = 1 / (1 + math.exp(-logit))
            if (prompt, query) in matched:
                wanted = targets.boxes[matched[prompt, query]].double().tolist()
                iou, giou = plain_iou(box, wanted)
                distance = sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
                add("l1", distance / num_boxes)
                add("giou", (1 - giou) / num_boxes)
                target = max(0.01, p**0.25 * iou**0.75) if class_target == "iou" else 1.0
                error = 10 * entropy(logit, target)
            else:
                crowds = label["boxes"][label["is_crowd"]].double().tolist()
                ignored = any(share_within(box, crowd) >= 0.5 for crowd in crowds)
                ignored = ignored or not label["is_exhaustive"]
                error = 0.0 if ignored else p**2 * entropy(logit, 0)
            if len(label["boxes"]) > 0:
                add("class", error / max(QUERIES, EVERY_PIXEL.class_queries) / len(labels))


def share_within(box: list[float], cover: list[float]) -> float:
    width, height = (
        max(
            0.0,
            min(box[i] + box[i + 2] / 2, cover[i] + cover[i + 2] / 2)
            - max(box[i] - box[i + 2] / 2, cover[i] - cover[i + 2] / 2),
        )
        for i in (0, 1)
    )
    return width * height / (box[2] * box[3])


def add_masks(
    terms: dict[str, float],
    masks: Tensor,
    matched: dict[tuple[int, int], int],
    targets: ConceptTargets,
    num_boxes: int,
) -> None:
    terms |= {"mask": 0.0, "dice": 0.0}
    for (prompt, query), instance in matched.items():
        wanted = targets.masks[instance].double()
        if wanted.sum() == 0:
            continue
        logits = torch.nn.functional.interpolate(
            masks[None, None, prompt, query], wanted.shape, mode="bilinear"
        )[0, 0]
        p = logits.sigmoid()
        right = torch.where(wanted == 1, p, 1 - p)
        alpha = torch.where(wanted == 1, 0.25, 0.75)
        terms["mask"] += (-alpha * (1 - right) ** 2 * right.log()).mean().item() / num_boxes
        dice = (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        terms["dice"] += (1 - dice).item() / num_boxes


def add_semantic(terms: dict[str, float], semantic: Tensor, labels: list[dict[str, Any]]) -> None:
    terms |= {"semantic": 0.0, "semantic_dice": 0.0}
    for prompt, label in enumerate(labels):
        lacks_mask = any(not mask.any() for mask in label["masks"])
        if lacks_mask or not label["is_exhaustive"]:
            continue
        wanted = torch.zeros(label["masks"].shape[-2:], dtype=torch.float64)
        for mask in label["masks"]:
            wanted[mask] = 1
        logits = torch.nn.functional.interpolate(
            semantic[prompt][None], wanted.shape, mode="bilinear"
        )[0, 0]
        p = logits.sigmoid()
        error = torch.where(wanted == 1, -p.log(), -(1 - p).log()).mean().item()
        terms["semantic"] += error / len(labels)
        dice = (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        terms["semantic_dice"] += (1 - dice).item() / len(labels)


@pytest.mark.parametrize("class_target", ["iou", "one"])
@pytest.mark.parametrize("seed", range(3))
def test_every_term_equals_plain_loops(seed, class_target):
    predictions, labels = random_case(seed)
    objective = ObjectiveConfig(mask_points=None, class_queries=10, class_target=class_target)

    terms = terms_of(predictions, labels, objective)

    expected = plain_terms(predictions, labels, class_target)
    assert terms.keys() == expected.keys() == objective.weights().keys()
    for name, value in expected.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-5, abs=1e-6), name
        assert value > 0, name


def test_weights_are_those_of_the_reference():
    weights = ObjectiveConfig().weights()

    assert weights["class"] == weights["presence"] == weights["auxiliary_presence"] == 20
    assert (weights["l1"], weights["giou"], weights["auxiliary_giou"]) == (5, 2, 2)
    assert (weights["mask"], weights["dice"]) == (200, 10)
    assert weights["one_to_many_class"] == weights["auxiliary_one_to_many_class"] == 40
    assert not [name for name in weights if "presence" in name and "many" in name]


def test_the_loss_is_the_weighted_sum():
    predictions, labels = random_case(0)
    terms, weights = terms_of(predictions, labels), EVERY_PIXEL.weights()

    loss = weighted_sum(terms, weights)

    assert loss.item() == pytest.approx(sum(weights[name] * terms[name].item() for name in terms))


ALL_TERMS = set(ObjectiveConfig().weights())


@pytest.mark.parametrize(
    ("field", "left_out"),
    [
        ("presence_weight", {"presence", "auxiliary_presence"}),
        ("l1_weight", {name for name in ALL_TERMS if name.endswith("l1")}),
        ("dice_weight", {"dice"}),
        ("semantic_weight", {"semantic"}),
        ("one_to_many_weight", {name for name in ALL_TERMS if "one_to_many" in name}),
        ("auxiliary_weight", {name for name in ALL_TERMS if name.startswith("auxiliary")}),
    ],
)
def test_a_term_without_weight_is_left_out(field, left_out):
    predictions, labels = random_case(0)

    terms = terms_of(predictions, labels, ObjectiveConfig(**{field: 0}))

    assert terms.keys() == ALL_TERMS - left_out


def test_a_batch_without_any_instance_teaches_absence_only():
    predictions, labels = random_case(0)
    empty = [labels[0], labels[5]]
    rows = [0, 5]
    predictions = of_prompts(predictions, rows)

    terms = terms_of(predictions, empty)

    taught = {name for name, value in terms.items() if value != 0}
    assert taught == {"presence", "auxiliary_presence", "semantic", "semantic_dice"}


def of_prompts(predictions: ConceptPredictions, rows: list[int]) -> ConceptPredictions:
    return ConceptPredictions(
        logits=predictions.logits[:, :, rows],
        boxes=predictions.boxes[:, :, rows],
        presence=predictions.presence[:, rows],
        masks=predictions.masks[rows],
        semantic=predictions.semantic[rows],
    )


@pytest.mark.parametrize("seed", range(3))
def test_micro_batches_with_the_counts_of_the_whole_add_up_to_it(seed):
    predictions, labels = random_case(seed)
    counts = count_labels(labels)
    whole = terms_of(predictions, labels)

    parts = [
        terms_of(of_prompts(predictions, rows), [labels[row] for row in rows], counts=counts)
        for rows in ([0, 1, 3], [2, 4, 5, 6])
    ]

    for name, value in whole.items():
        total = sum(part[name] for part in parts)
        torch.testing.assert_close(total, value, rtol=1e-6, atol=1e-7)
    weights = EVERY_PIXEL.weights()
    torch.testing.assert_close(
        sum(weighted_sum(part, weights) for part in parts),
        weighted_sum(whole, weights),
        rtol=1e-6,
        atol=0,
    )


def perfect_case() -> tuple[ConceptPredictions, list[dict[str, Any]]]:
    """Two prompts with two instances each that queries 1 and 4 have exactly."""
    generator = torch.Generator().manual_seed(0)
    labels = []
    for _ in range(2):
        masks = torch.zeros(2, SIDE, SIDE, dtype=torch.bool)
        masks[0, :3], masks[1, 4:] = True, True
        labels.append({"boxes": random_boxes(2, generator=generator), "masks": masks})
    predictions = of_prompts(random_predictions(generator), [0, 1])
    predictions.logits[:] = -12
    predictions.presence[:] = 10
    for prompt, label in enumerate(labels):
        predictions.boxes[:, :, prompt, [4, 1]] = label["boxes"]
        predictions.logits[:, :, prompt, [4, 1]] = 12
        predictions.masks[prompt, [4, 1]] = label["masks"].float() * 40 - 20
        predictions.semantic[prompt, 0] = label["masks"].any(dim=0).float() * 40 - 20
    return predictions, labels


def test_what_is_right_costs_next_to_nothing():
    terms = terms_of(*perfect_case())

    for name, value in terms.items():
        assert value.item() == pytest.approx(0, abs=1e-4), name


def grown(predictions: ConceptPredictions) -> ConceptPredictions:
    """The same, with gradients."""
    for tensor in vars(predictions).values():
        tensor.requires_grad_(True)
    return predictions


def test_predictions_on_crowds_are_neither_right_nor_wrong():
    predictions, labels = random_case(0)
    crowd = labels[4]["boxes"][CROWDS[4][0]]
    predictions.boxes[:, :, 4, 2] = torch.cat([crowd[:2], crowd[2:] / 2])  # wholly on the crowd
    predictions.boxes[:, :, 4, 3] = torch.tensor([0.01, 0.01, 0.005, 0.005])  # on nothing
    predictions.logits[:, :, 4, 2:4] = -3  # not worth matching
    grown(predictions)

    terms = terms_of(predictions, labels)
    (terms["class"] + terms["one_to_many_class"]).backward()

    gradient = predictions.logits.grad[:, -1, 4]
    instance_of = match_one_to_one(
        predictions.logits[0], predictions.boxes[0], pack_labels(labels, 7, CPU), EVERY_PIXEL
    )[-1]
    matched = set(instance_of[pack_labels(labels, 7, CPU).prompt_of == 4].tolist())
    assert 2 not in matched
    assert (gradient[0, 2], gradient[1, 2]) == (0, 0)
    assert (gradient[:, 3] > 0).all()


def test_where_there_may_be_more_instances_the_unmatched_learn_nothing():
    predictions, labels = random_case(1)
    grown(predictions)

    terms_of(predictions, labels)["class"].backward()

    gradient = predictions.logits.grad[0, -1]
    positive, unknown = NOT_EXHAUSTIVE
    assert (gradient[positive] != 0).sum() == COUNTS[positive]
    assert (gradient[unknown] == 0).all()
    assert (gradient[1] != 0).all()  # exhaustive, and one instance


def test_presence_is_unknown_where_nothing_was_found_and_not_everything_searched():
    predictions, labels = random_case(1)
    grown(predictions)

    terms_of(predictions, labels)["presence"].backward()

    gradient = predictions.presence.grad[-1]
    assert gradient[5] == 0
    assert gradient[0] > 0  # absent
    assert (gradient[[1, 2, 3, 4, 6]] < 0).all()  # present; in 6 as a crowd


@pytest.mark.parametrize(
    ("terms", "taught"),
    [
        (("presence", "auxiliary_presence"), {"presence"}),
        (("class", "auxiliary_class", "one_to_many_class"), {"logits"}),
        (("l1", "giou", "auxiliary_l1", "one_to_many_giou"), {"boxes"}),
        (("mask", "dice"), {"masks"}),
        (("semantic", "semantic_dice"), {"semantic"}),
    ],
)
def test_a_term_teaches_what_it_is_about(terms, taught):
    predictions, labels = random_case(2)
    grown(predictions)

    losses = terms_of(predictions, labels)
    sum(losses[name] for name in terms).backward()

    got = {name: tensor.grad for name, tensor in vars(predictions).items()}
    assert {name for name, grad in got.items() if grad is not None and grad.any()} == taught


def test_points_drawn_evenly_give_the_loss_of_all_pixels():
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(2, 4, 5, 5, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (256, 256), mode="bilinear")
    logits, targets = 3 * smooth[0], smooth[0] + smooth[1] > 0
    torch.manual_seed(0)

    pairs = [doubtful_points(logits, targets, 5000, doubtful_share=0) for _ in range(20)]

    exact = all_pixels(logits, targets)
    # Less than 1 % by chance; 1 to 2 % since points between pixels see a mixture at the edges.
    for loss in (focal_loss, dice_loss):
        sampled = torch.stack([loss(*pair) for pair in pairs]).mean(0)
        torch.testing.assert_close(sampled, loss(*exact), rtol=0.03, atol=0)


def test_most_points_lie_where_the_prediction_is_in_doubt():
    logits = torch.full((1, 32, 32), 8.0)
    logits[0, :, 15:17] = torch.tensor([0.5, -0.5])  # two of 32 columns
    logits[0, :, 17:] = -8
    torch.manual_seed(0)

    values, _ = doubtful_points(logits, logits > 0, 100)

    # 300 candidates have some 28 in the three columns' width that is below the surest.
    assert (values.abs() < 7.9).float().mean() > 0.2
    even, _ = doubtful_points(logits, logits > 0, 100, doubtful_share=0)
    assert (even.abs() < 7.9).float().mean() < 0.2


def test_half_precision_gives_terms_in_float32():
    predictions, labels = random_case(0)
    halves = copy.deepcopy(predictions)
    for name in ("logits", "presence", "masks", "semantic"):
        setattr(halves, name, getattr(predictions, name).bfloat16())
        setattr(predictions, name, getattr(halves, name).float())

    terms, expected = terms_of(halves, labels), terms_of(predictions, labels)

    assert {value.dtype for value in terms.values()} == {torch.float32}
    assert terms == expected
