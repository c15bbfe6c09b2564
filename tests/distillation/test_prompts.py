"""What is asked of images."""

import pytest
import torch

from efficientsam3_hf.distillation.prompts import (
    ObjectPrompts,
    choose_concepts,
    choose_objects,
    correct,
    count_concepts,
    count_objects,
    read_objects,
)
from efficientsam3_hf.models.prompts import PADDING_LABEL


def label(image: int, count: int, seed: int = 0, crowd: int | None = None):
    generator = torch.Generator().manual_seed(seed)
    sizes = 0.1 + 0.3 * torch.rand(count, 2, generator=generator)
    centres = 0.25 + 0.5 * torch.rand(count, 2, generator=generator)
    is_crowd = torch.zeros(count, dtype=torch.bool)
    if crowd is not None:
        is_crowd[crowd] = True
    return {
        "image": image,
        "image_id": f"name {seed}",
        "boxes": torch.cat([centres, sizes], dim=1),
        "points": centres,
        "is_crowd": is_crowd,
    }


def asked_of(prompts: ObjectPrompts, image: int) -> torch.Tensor:
    """All that is asked of one image, but for its number."""
    rows = prompts.image == image
    parts = (prompts.points, prompts.labels, prompts.draws)
    return torch.cat([part[rows].flatten(1).float() for part in parts], dim=1)


def test_what_is_asked_of_an_image_depends_on_nothing_but_seed_step_and_its_name():
    settings = {"most": 5, "seed": 3, "step": 7, "box_noise": 0.1, "corrections": 2}
    first, second = label(0, 9, seed=1), label(1, 9, seed=2)
    together = read_objects([first, second], 2)
    swapped = read_objects([{**second, "image": 0}, {**first, "image": 1}], 2)

    groups = choose_objects(together, **settings)
    others = choose_objects(swapped, **settings)

    assert [len(prompts) for prompts in groups] != [10, 0]
    for prompts, other in zip(groups, others, strict=True):
        assert torch.equal(asked_of(prompts, 0), asked_of(other, 1))
        assert torch.equal(asked_of(prompts, 1), asked_of(other, 0))
    for change in ({"seed": 4}, {"step": 8}):
        changed = choose_objects(together, **{**settings, **change})
        assert any(
            not torch.equal(asked_of(one, 0), asked_of(two, 0))
            for one, two in zip(groups, changed, strict=True)
        )


def test_prompts_are_boxes_and_points_of_different_objects():
    labels = [label(0, 6, seed=1), label(0, 3, seed=1), label(2, 2, seed=3)]
    objects = read_objects(labels, 3)
    assert objects.names == ["name 1", "", "name 3"]

    by_box, by_click = choose_objects(objects, most=20, seed=0, step=0, box_share=0.5)

    asked = torch.cat([by_box.object, by_click.object])
    assert sorted(asked.tolist()) == list(range(11))
    assert len(by_box)
    assert len(by_click)
    for prompts in (by_box, by_click):
        for row, number in enumerate(prompts.object.tolist()):
            of_label = labels[objects.label[number]]
            instance = objects.instance[number]
            centre, size = of_label["boxes"][instance].split(2)
            assert prompts.image[row] == of_label["image"]
            if prompts is by_box:
                expected = torch.stack([centre - size / 2, centre + size / 2])
                assert prompts.labels[row].tolist() == [2, 3]
            else:
                expected = of_label["points"][instance][None]
                assert prompts.labels[row].tolist() == [1]
            torch.testing.assert_close(prompts.points[row], expected)


def test_noise_moves_corners_a_little():
    objects = read_objects([label(0, 50)], 1)
    settings = {"most": 50, "seed": 0, "step": 0, "box_share": 1.0}

    (clean, _), (noisy, _) = (choose_objects(objects, **settings, box_noise=n) for n in (0.0, 0.1))

    moved = (noisy.points - clean.points).abs()
    assert moved.max() <= 20 / 1008 + 1e-6
    assert moved.mean() > 0.005
    assert (noisy.points[:, 1] > noisy.points[:, 0]).all()


def test_crowds_and_boxes_without_extent_are_not_asked_for():
    empty = label(0, 3, crowd=1)
    empty["boxes"][2, 2] = 0

    assert read_objects([empty], 1).instance.tolist() == [0]


def test_counts_are_those_of_what_is_chosen():
    labels = [label(0, 4, 1), label(0, 0, 1), label(2, 1, 3), label(2, 2, 3), label(2, 5, 3)]
    objects = read_objects(labels, 4)
    for most in (0, 1, 3, 100):
        chosen = choose_objects(objects, most, seed=0, step=0)
        assert count_objects(objects, most) == sum(len(prompts) for prompts in chosen)
        for has_phrases in (False, True):
            concepts = choose_concepts(labels, objects, most, 0, 0, has_phrases)
            assert count_concepts(labels, objects, most, has_phrases) == len(concepts)
    nothing = read_objects([], 2)
    assert count_objects(nothing, 3) == count_concepts([], nothing, 3, True) == 0
    assert [len(prompts) for prompts in choose_objects(nothing, 3, 0, 0)] == [0, 0]
    assert len(choose_concepts([], nothing, 3, 0, 0, has_phrases=True)) == 0


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_an_exemplar_is_an_instance_of_its_phrase(share):
    labels = [label(0, 4, 1), label(1, 0, 2), label(1, 3, 2)]
    objects = read_objects(labels, 2)

    concepts = choose_concepts(labels, objects, 9, 0, 0, has_phrases=True, exemplar_share=share)

    assert sorted(concepts.label.tolist()) == [0, 1, 2]
    for row, number in enumerate(concepts.label.tolist()):
        boxes = labels[number]["boxes"]
        assert concepts.image[row] == labels[number]["image"]
        if share and len(boxes):
            assert concepts.boxes_labels[row].tolist() == [1]
            assert (boxes - concepts.boxes_cxcywh[row]).abs().sum(dim=1).min() < 1e-6
        else:
            assert concepts.boxes_labels[row].tolist() == [PADDING_LABEL]


def test_without_phrases_every_concept_is_an_exemplar():
    labels = [label(0, 4, 1), label(1, 0, 2)]

    concepts = choose_concepts(labels, read_objects(labels, 2), 3, 0, 0, has_phrases=False)

    assert concepts.image.tolist() == [0, 0, 0]
    assert concepts.boxes_labels.eq(1).all()
    distances = (labels[0]["boxes"][:, None] - concepts.boxes_cxcywh[:, 0]).abs().sum(dim=-1)
    assert sorted(distances.argmin(dim=0).tolist()) == sorted(set(distances.argmin(dim=0).tolist()))


def clicks(draws: torch.Tensor) -> ObjectPrompts:
    count = len(draws)
    return ObjectPrompts(
        image=torch.zeros(count, dtype=torch.long),
        points=torch.rand(count, 2, 2),
        labels=torch.tensor([[2, 3]]).repeat(count, 1),
        draws=draws[:, None],
        object=torch.arange(count),
    )


def test_a_correction_is_on_any_disputed_pixel_and_says_whose_it_is():
    own, wanted = -torch.ones(6, 8), -torch.ones(6, 8)
    own[1:3, 1:4] = wanted[1:3, 3:6] = 1  # four pixels too much, four missing
    count = 80
    prompts = clicks(torch.linspace(0, 1, count))  # 1 itself, too, as rounding might give it

    corrected, kept = correct(
        prompts, own.expand(count, -1, -1), wanted.expand(count, -1, -1), 0, 8
    )

    assert kept.tolist() == list(range(count))
    assert torch.equal(corrected.points[:, :2], prompts.points)
    assert torch.equal(corrected.labels[:, :2], prompts.labels)
    columns = (corrected.points[:, 2, 0] * 8).floor().long()
    rows = (corrected.points[:, 2, 1] * 6).floor().long()
    assert torch.equal(corrected.labels[:, 2] == 1, wanted[rows, columns] > 0)
    assert ((own > 0) != (wanted > 0))[rows, columns].all()
    _, times = torch.stack([rows, columns]).unique(dim=1, return_counts=True)
    assert len(times) == 8
    assert times.max() - times.min() <= 2
    middle = torch.stack([(columns + 0.5) / 8, (rows + 0.5) / 6], dim=1)
    torch.testing.assert_close(corrected.points[:, 2], middle)


def test_prompts_whose_masks_agree_are_left_out():
    own = torch.ones(3, 4, 4)
    wanted = torch.ones(3, 4, 4)
    wanted[1, 0] = wanted[2, :2] = -1  # 0, 4 and 8 disputed pixels

    corrected, kept = correct(clicks(torch.full((3,), 0.5)), own, wanted, 0, least=4)
    _, in_picture = correct(
        clicks(torch.full((3,), 0.5)), own, wanted, 0, 4, torch.arange(4)[None, :, None] > 0
    )
    nobody, _ = correct(clicks(torch.full((3,), 0.5)), own, own, 0, least=0)

    assert kept.tolist() == corrected.object.tolist() == [1, 2]
    assert corrected.labels[:, 2].tolist() == [0, 0]
    assert in_picture.tolist() == [2]  # of the other, no disputed pixel is on the picture
    assert len(nobody) == 0
