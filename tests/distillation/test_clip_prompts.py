"""What is asked of clips: from the clip's own name alone, and where it should be."""

from typing import Any

import pytest
import torch

from efficientsam3_hf.distillation.clip_prompts import (
    KINDS,
    PromptRules,
    correcting_clicks,
    counted_frames,
    first_prompts,
    make_plan,
    to_pixels,
    true_masks,
)

FRAMES, HEIGHT, WIDTH = 5, 12, 20
EVEN = PromptRules(2, (1, 1, 1), 2)


def clip(name: str, starts: list[int | None], annotated: tuple[int, ...] = (0, 2, 4)) -> dict:
    """Labels of a clip whose objects come at these frames, each a box of its own; None never."""
    masks = torch.zeros(len(starts), FRAMES, HEIGHT, WIDTH, dtype=torch.bool)
    boxes = torch.zeros(len(starts), FRAMES, 4)
    for number, start in enumerate(starts):
        for time in range(FRAMES) if start is not None else ():
            if time >= start and time in annotated:
                left = 2 * number + time
                masks[number, time, 3:7, left : left + 5] = True
                middle = torch.tensor([(left + 2.5) / WIDTH, 5 / HEIGHT])
                boxes[number, time] = torch.cat([middle, torch.tensor([5 / WIDTH, 4 / HEIGHT])])
    return {
        "masks": masks,
        "boxes": boxes,
        "is_annotated": torch.tensor([time in annotated for time in range(FRAMES)]),
        "frame_indices": list(range(FRAMES)),
        "source_id": name,
    }


CLIPS = [clip("a", [0, 2, None, 0]), clip("b", [2]), clip("c", [4, 0, 0])]


def test_what_is_asked_of_a_clip_depends_on_nothing_but_seed_step_and_clip():
    together = make_plan(CLIPS, EVEN, 0, 7).clips

    assert [make_plan([each], EVEN, 0, 7).clips[0] for each in CLIPS] == together
    assert make_plan(CLIPS[::-1], EVEN, 0, 7).clips == together[::-1]
    assert make_plan(CLIPS, EVEN, 0, 8).clips != together
    assert make_plan(CLIPS, EVEN, 1, 7).clips != together
    renamed = [{**CLIPS[0], "source_id": "d"}]
    assert make_plan(renamed, EVEN, 0, 7).clips[0] != together[0]


def test_objects_begin_where_they_are_first_seen():
    for step in range(20):
        for label, asked in zip(CLIPS, make_plan(CLIPS, EVEN, 0, step).clips, strict=True):
            assert 1 <= len(asked) <= 2
            for each in asked:
                first = label["masks"][each.number].flatten(1).any(1).nonzero()[0, 0]
                assert each.start == first  # the third of the first clip never comes


def test_objects_kinds_and_corrections_are_drawn_evenly():
    plans = [make_plan(CLIPS[:1], EVEN, 0, step) for step in range(600)]
    asked = [each for plan in plans for _, _, each in plan.rows()]

    for found, choices in (
        ([each.kind for each in asked], KINDS),
        ([each.number for each in asked], (0, 1, 3)),
        ([each.corrections for each in asked], (0, 1, 2)),
    ):
        for choice in choices:
            assert found.count(choice) / len(asked) == pytest.approx(1 / 3, abs=0.06), choice
        assert set(found) == set(choices)


@pytest.mark.parametrize("size", [112, 128])
def test_prompts_lie_on_their_objects(size: int):
    for step in range(10):
        plan = make_plan(CLIPS, EVEN, 0, step)
        prompts = to_pixels(
            first_prompts(plan, CLIPS, 0.1), plan.num_objects, size, torch.device("cpu")
        )
        asked = {row: (CLIPS[clip], each) for row, clip, each in plan.rows()}
        assert sorted(row for prompt in prompts.prompts for row in prompt.rows) == sorted(asked)
        for prompt in prompts.prompts:
            for place, row in enumerate(prompt.rows):
                label, each = asked[row]
                mask = label["masks"][each.number, each.start]
                rows, columns = mask.nonzero().unbind(1)
                scale = torch.tensor([size / WIDTH, size / HEIGHT])
                assert prompt.frame == each.start
                if prompt.masks is not None:
                    assert each.kind == "mask"
                    assert torch.equal(prompt.masks[place, 0] > 0.5, mask)
                elif each.kind == "point":
                    assert prompt.labels[place].tolist() == [1]
                    x, y = ((prompt.points[place, 0] + 0.5) / scale).tolist()
                    assert mask[int(y), int(x)]
                else:
                    assert prompt.labels[place].tolist() == [2, 3]
                    (x1, y1), (x2, y2) = (prompt.points[place] / scale).tolist()
                    edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                    for found, edge, side in zip(
                        [x1, y1, x2, y2], edges, [5, 4, 5, 4], strict=True
                    ):
                        assert abs(found - float(edge)) <= 0.1 * side + 1e-4


def test_clicks_go_where_predictions_are_worst():
    plan = make_plan(CLIPS[:1], PromptRules(None, (0, 0, 1), 1), 0, "all corrected")
    for each in plan.clips[0]:
        each.corrections = 1
    truth = true_masks(plan, CLIPS[:1])
    logits = 20 * truth - 10
    logits[0, 4, 3:7, 4:6] *= -1  # two fifths of the first are missed in the last frame,
    logits[0, 2, 3, 2] *= -1  # one pixel before,
    logits[0, 1] = 10  # all is wrong where nobody knows, and where the prompt is
    logits[0, 0] = 10
    logits[2, 2, 0] = 10  # the third is seen where it is not; the second is right everywhere

    clicks = correcting_clicks(plan, CLIPS[:1], truth, logits)

    found = {
        row: (prompt.frame, prompt.points[place, 0] * torch.tensor([WIDTH, HEIGHT]), prompt.labels)
        for prompt in clicks
        for place, row in enumerate(prompt.rows)
    }
    assert sorted(found) == [0, 2]
    frame, (x, y), labels = found[0]
    assert frame == 4
    assert labels.tolist() == [[1]]
    assert 4 <= x < 6 and 3 <= y < 7  # noqa: PT018
    frame, (x, y), labels = found[2]
    assert frame == 2
    assert labels.tolist() == [[0]]
    assert y < 1


def test_frames_count_by_what_is_known_of_them():
    plan = make_plan(CLIPS, PromptRules(None, (0, 0, 1)), 0, 0)
    counted = counted_frames(plan, CLIPS)
    row = plan.num_objects + 0  # the object of the second clip, given by a mask on frame 2

    assert {name: flags[row].nonzero()[:, 0].tolist() for name, flags in counted.items()} == {
        "tracked": [2, 3, 4],
        "remembered": [3, 4],
        "predicted": [3, 4],
        "judged": [4],
        "visible": [4],
    }
    by_point = make_plan(CLIPS, PromptRules(None, (1, 0, 0)), 0, 0)
    assert counted_frames(by_point, CLIPS)["judged"][row].tolist() == [
        False,
        False,
        True,
        False,
        True,
    ]
    late = counted_frames(plan, CLIPS, constant=4)
    assert late["tracked"][row].nonzero()[:, 0].tolist() == [4]
    assert not counted["tracked"][row + 1].any()  # this clip has no second object


def test_a_hidden_object_is_judged_but_not_visible():
    label: dict[str, Any] = clip("a", [0])
    label["masks"][0, 2] = False
    plan = make_plan([label], PromptRules(None, (1, 0, 0)), 0, 0)

    counted = counted_frames(plan, [label])

    assert counted["judged"][0].nonzero()[:, 0].tolist() == [0, 2, 4]
    assert counted["visible"][0].nonzero()[:, 0].tolist() == [0, 4]


def test_something_is_asked_even_where_nothing_is_seen():
    empty = [clip("a", [None, None])]
    plan = make_plan(empty, EVEN, 0, 0)

    (prompt,) = first_prompts(plan, empty, 0.1)

    assert prompt.rows == [0]
    assert not any(flags.any() for flags in counted_frames(plan, empty).values())
