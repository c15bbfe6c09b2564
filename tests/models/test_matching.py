"""Matching of queries to instances, against all permutations and plain loops."""

from itertools import permutations

import pytest
import torch
from objective_cases import (
    COUNTS,
    QUERIES,
    plain_iou,
    plain_one_to_many,
    random_boxes,
    random_labels,
    random_predictions,
)
from torch import Tensor

from efficientsam3_hf.models import matching
from efficientsam3_hf.models.concept_targets import ConceptTargets, count_labels, pack_labels
from efficientsam3_hf.models.matching import (
    instance_of_query,
    match_one_to_many,
    match_one_to_one,
    matching_costs,
)
from efficientsam3_hf.models.objective_config import ObjectiveConfig

OBJECTIVE = ObjectiveConfig()


def plain_cost(logit: float, box: list[float], wanted: list[float]) -> float:
    """2 x focal classification + 5 x L1 - 2 x generalised IoU."""
    p = torch.tensor(logit, dtype=torch.float64).sigmoid().item()
    log = lambda x: torch.tensor(x, dtype=torch.float64).log().item()  # noqa: E731
    focal = -0.25 * (1 - p) ** 2 * log(p) + 0.75 * p**2 * log(1 - p)
    distance = sum(abs(x - y) for x, y in zip(box, wanted, strict=True))
    return 2 * focal + 5 * distance - 2 * plain_iou(box, wanted)[1]


def random_case(seed: int) -> tuple[Tensor, Tensor, ConceptTargets]:
    """Scores and boxes of two layers, and targets."""
    generator = torch.Generator().manual_seed(seed)
    predictions = random_predictions(generator)
    targets = pack_labels(random_labels(generator), len(COUNTS), torch.device("cpu"))
    return predictions.logits[0], predictions.boxes[0], targets


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_paper(seed):
    logits, boxes, targets = random_case(seed)

    costs = matching_costs(logits, boxes, targets, OBJECTIVE)

    for layer, instance, query in torch.randint(0, 6, (40, 3)).tolist():
        layer %= len(logits)
        prompt = targets.prompt_of[instance]
        expected = plain_cost(
            logits[layer, prompt, query].item(),
            boxes[layer, prompt, query].tolist(),
            targets.boxes[instance].tolist(),
        )
        assert costs[layer, instance, query].item() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("count", range(1, 5))
@pytest.mark.parametrize("num_queries", [1, 3, 5])
def test_one_to_one_costs_no_more_than_any_permutation(count, num_queries):
    generator = torch.Generator().manual_seed(10 * count + num_queries)
    logits = torch.randn(2, 1, num_queries, generator=generator)
    boxes = random_boxes(2, 1, num_queries, generator=generator)
    label = {"boxes": random_boxes(count, generator=generator)}
    targets = pack_labels([label], 1, torch.device("cpu"))

    query_of = match_one_to_one(logits, boxes, targets, OBJECTIVE)

    costs = matching_costs(logits, boxes, targets, OBJECTIVE).double()
    for of_layer, cost in zip(query_of, costs, strict=True):
        matched = of_layer >= 0
        used = of_layer[matched].tolist()
        assert len(used) == len(set(used)) == min(count, num_queries)
        reached = cost[matched, of_layer[matched]].sum().item()
        if count <= num_queries:
            rows = range(count)
            ways = (
                list(zip(rows, way, strict=True)) for way in permutations(range(num_queries), count)
            )
        else:
            columns = range(num_queries)
            ways = (
                list(zip(way, columns, strict=True))
                for way in permutations(range(count), num_queries)
            )
        least = min(sum(cost[row, column].item() for row, column in way) for way in ways)
        assert reached == pytest.approx(least, abs=1e-5)


def test_crowds_and_surplus_instances_have_no_query():
    logits, boxes, targets = random_case(3)

    query_of = match_one_to_one(logits, boxes, targets, OBJECTIVE)

    assert (query_of[:, targets.is_crowd] == -1).all()
    for prompt, count in enumerate(COUNTS):
        of_prompt = query_of[:, (targets.prompt_of == prompt) & ~targets.is_crowd]
        if of_prompt.shape[1]:
            matched = (of_prompt >= 0).sum(dim=1)
            assert (matched == min(of_prompt.shape[1], QUERIES)).all(), count


def test_the_instance_of_a_query_is_the_other_way_round():
    logits, boxes, targets = random_case(4)
    query_of = match_one_to_one(logits, boxes, targets, OBJECTIVE)

    instance_of = instance_of_query(query_of, targets, QUERIES)

    pairs = {
        (layer, int(targets.prompt_of[instance]), int(query), instance)
        for layer, of_layer in enumerate(query_of)
        for instance, query in enumerate(of_layer)
        if query >= 0
    }
    found = {
        (*place, int(instance_of[tuple(place)])) for place in (instance_of >= 0).nonzero().tolist()
    }
    assert found == pairs


@pytest.mark.parametrize(("threshold", "at_least"), [(0.4, 5), (0.1, 15)])
@pytest.mark.parametrize("seed", range(5))
def test_one_to_many_equals_loops(seed, threshold, at_least):
    logits, boxes, targets = random_case(seed)
    logits = logits[-1] + 3  # so that many are good enough

    instance_of = match_one_to_many(logits, boxes[-1], targets, threshold=threshold)

    expected = plain_one_to_many(logits, boxes[-1], targets, threshold)
    assert (expected >= 0).sum() >= at_least
    assert instance_of.tolist() == expected.tolist()


def test_of_two_equal_instances_a_query_goes_to_the_first():
    box = torch.tensor([[0.5, 0.5, 0.4, 0.4]])
    targets = pack_labels([{"boxes": box.repeat(2, 1)}], 1, torch.device("cpu"))

    instance_of = match_one_to_many(torch.zeros(1, 5), box.repeat(5, 1)[None], targets)

    assert sorted(instance_of[0].tolist()) == [-1, 0, 0, 0, 0]


@pytest.mark.parametrize("broken", ["logits", "boxes"])
def test_a_cost_that_is_no_number_is_an_error(broken):
    logits, boxes, targets = random_case(5)
    {"logits": logits, "boxes": boxes}[broken][1, 2, 4] = torch.nan

    with pytest.raises(FloatingPointError, match="is nan for query 4 in decoder layer 1"):
        match_one_to_one(logits, boxes, targets, OBJECTIVE)


def test_without_scipy_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(matching, "linear_sum_assignment", None)

    with pytest.raises(ImportError, match=r'pip install "efficientsam3-hf\[train\]"'):
        match_one_to_one(*random_case(6), OBJECTIVE)


def test_labels_are_counted():
    labels = random_labels(torch.Generator().manual_seed(0))

    counts = count_labels(labels)

    assert counts == {"boxes": 15, "prompts": 7}  # 18 less three crowds


BOX = torch.full((1, 4), 0.5)
MASK = torch.ones(1, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([{"boxes": BOX}], "1 labels for 2 prompts"),
        ({"boxes": BOX}, "one dictionary for each prompt"),
        ([{"masks": MASK}, {"boxes": BOX}], "one dictionary for each prompt"),
        ([{"boxes": BOX[0]}, {"boxes": BOX}], r"boxes of label 0 must be \(instances, 4\)"),
        ([{"boxes": BOX}, {"boxes": BOX, "masks": MASK[0]}], "masks of label 1 must be"),
        ([{"boxes": BOX, "is_crowd": torch.zeros(2)}, {"boxes": BOX}], "is_crowd of label 0 has 2"),
        (
            [{"boxes": BOX, "masks": MASK}, {"boxes": BOX, "masks": MASK[..., :4]}],
            "Masks of 2 sizes",
        ),
    ],
)
def test_labels_that_cannot_be_meant_are_errors(labels, message):
    with pytest.raises(ValueError, match=message):
        pack_labels(labels, 2, torch.device("cpu"))
