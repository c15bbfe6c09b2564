"""Changes act on pictures and annotations alike."""

import pickle
from dataclasses import replace

import numpy as np
import pytest

from efficientsam3_hf.data.augmentations import (
    Augmentations,
    Change,
    ChooseInstances,
    ChooseQueries,
    change_clip,
    change_image,
    window_of,
)
from efficientsam3_hf.data.collators import ImageCollator
from efficientsam3_hf.data.masks_rle import decode_rle, rle_box, to_rle
from efficientsam3_hf.data.samples import ImageSample, Instance, Query
from efficientsam3_hf.data.synthetic import Clips, Scenes

CHANGES = [
    Change(),
    Change(flip=True),
    Change(scale=0.6, place=(0.2, 0.9)),
    Change(scale=1.5, place=(0.8, 0.1)),
    Change(flip=True, scale=1.3, place=(0.0, 1.0)),
    Change(flip=True, scale=0.5, place=(1.0, 0.0)),
]


@pytest.fixture
def marked() -> ImageSample:
    """A picture that is white where its one mask is, so that it shows where the mask belongs."""
    mask = np.zeros((60, 100), dtype=bool)
    mask[20:45, 10:60] = True
    mask[20:30, 10:30] = False
    image = np.repeat(mask[..., None], 3, axis=2).astype(np.uint8) * 255
    rle = to_rle(mask, (60, 100))
    instance = Instance(rle_box(rle), rle, [(40.0, 35.0)], source_id=5)
    return ImageSample("own", 1, "a.jpg", (60, 100), [Query("a door", [instance])], image)


@pytest.mark.parametrize("change", CHANGES)
def test_masks_boxes_and_points_move_with_the_pixels(marked, change: Change):
    changed = change_image(marked, change)

    (instance,) = changed.queries[0].instances
    white = changed.image[..., 0] > 127
    both, either = (white & instance.mask).sum(), (white | instance.mask).sum()
    assert changed.image.shape == marked.image.shape
    assert both / either > 0.97
    np.testing.assert_allclose(instance.box_xyxy, rle_box(instance.rle), atol=1.01)
    assert instance.points
    for x, y in instance.points:
        assert instance.mask[int(y), int(x)]


def test_doing_nothing_changes_nothing(marked):
    changed = change_image(marked, Change())

    np.testing.assert_array_equal(changed.image, marked.image)
    assert changed.queries == marked.queries


def test_a_flip_puts_a_point_on_the_same_pixel(marked):
    (instance,) = change_image(marked, Change(flip=True)).queries[0].instances

    assert instance.points == [(59.0, 35.0)]  # of 100 columns, numbered from 0
    assert instance.box_xyxy == (40, 20, 90, 45)


def test_two_flips_are_none(marked):
    twice = change_image(change_image(marked, Change(flip=True)), Change(flip=True))

    np.testing.assert_array_equal(twice.image, marked.image)
    assert twice.queries == marked.queries


def test_what_leaves_the_window_is_neither_asked_for_nor_absent(marked):
    away = Change(scale=2.0, place=(1.0, 0.0))  # the upper right quarter

    changed = change_image(marked, away, least_left=0.3)

    (query,) = changed.queries
    assert query.instances == []
    assert not query.is_exhaustive
    assert not query.is_negative


def test_negatives_stay_negatives_and_what_nobody_annotated_stays_so(marked):
    marked.queries = [Query("a cat", []), Query("a dog", None)]

    changed = change_image(marked, CHANGES[4])

    assert changed.queries[0].is_negative
    assert changed.queries[1].instances is None


def test_boxes_without_masks_are_cut_at_the_border(marked):
    marked.queries = [Query("a door", [Instance((10, 20, 60, 45))])]

    (instance,) = change_image(marked, Change(scale=2.0, place=(0.0, 0.0))).queries[0].instances

    assert instance.box_xyxy == (20, 40, 100, 60)


def test_a_picture_that_was_decoded_smaller_is_changed_alike(marked):
    small = replace(marked, image=np.ascontiguousarray(marked.image[::2, ::2]))

    changed = change_image(small, CHANGES[4])

    (instance,) = changed.queries[0].instances
    white = changed.image[..., 0] > 127
    mask = instance.mask[::2, ::2]
    assert changed.image.shape == (30, 50, 3)
    assert (white & mask).sum() / (white | mask).sum() > 0.9


@pytest.mark.parametrize("change", CHANGES)
def test_a_clip_is_changed_as_a_whole(change: Change):
    clip = Clips(3, side=96, num_frames=4)[1]

    changed = change_clip(clip, change)

    assert len(changed.frames) == 4
    # A frame that is white where a masklet is must move to where its changed mask is.
    for masklet, moved in zip(clip.masklets, changed.masklets, strict=True):
        for frame, rle in moved.rles.items():
            drawn = np.repeat(decode_rle(masklet.rles[frame])[..., None], 3, axis=2) * np.uint8(255)
            picture = ImageSample("own", 1, "", clip.size, image=drawn)
            white = change_image(picture, change).image[..., 0] > 127
            mask = decode_rle(rle)
            assert (white & mask).sum() / (white | mask).sum() > 0.85


def test_a_sample_is_changed_the_same_way_whenever_its_epoch_comes_again(marked):
    augment = Augmentations(seed=3)
    first = augment(marked)
    augment.set_epoch(1)
    second = augment(marked)
    augment.set_epoch(0)

    np.testing.assert_array_equal(augment(marked).image, first.image)
    assert not np.array_equal(second.image, first.image)
    assert not np.array_equal(Augmentations(seed=4)(marked).image, first.image)
    other = augment(replace(marked, source_id=2))
    assert not np.array_equal(other.image, first.image)


def test_worker_processes_see_the_epoch(marked):
    augment = Augmentations()
    copied = pickle.loads(pickle.dumps(augment))

    # Pickled to a file it is a copy; what a forked worker has is the same memory.
    assert augment.epoch.is_shared()
    assert copied.choose(marked) == augment.choose(marked)


def test_about_half_are_flipped_but_none_that_speak_of_sides(marked):
    augment = Augmentations()
    samples = [replace(marked, source_id=number) for number in range(200)]

    def flips(phrase: str) -> int:
        asked = [replace(sample, queries=[Query(phrase, [])]) for sample in samples]
        return sum(augment.choose(sample).flip for sample in asked)

    for phrase in ("a shoe", "bright red", "an upright piano", "cleft chin"):
        assert 75 < flips(phrase) < 125
    for phrase in ("left shoe", "girl on left, in red", "Rightmost dog", "counterclockwise arrow"):
        assert flips(phrase) == 0


def test_colours_change_and_stay_in_range(marked):
    marked.image[:] = (200, 100, 50)

    changed = change_image(marked, Change(brightness=0.5, saturation=0.0))

    grey = changed.image.reshape(-1, 3)
    assert (grey[:, 0] == grey[:, 1]).all()
    assert 40 < grey.mean() < 80


def test_windows_stay_within_what_was_asked_for():
    window = window_of(Change(scale=0.5, place=(1.0, 0.0)), (60, 100))

    assert (window.scaled, window.corner) == ((30, 50), (50, 0))


def test_the_collator_augments_before_the_processor(processor):
    sample = Scenes(1, side=64)[0]

    plain = ImageCollator(processor)([sample])
    changed = ImageCollator(processor, augment=[Augmentations(seed=1)])([sample])

    assert plain["pixel_values"].shape == changed["pixel_values"].shape
    assert not plain["pixel_values"].equal(changed["pixel_values"])


@pytest.mark.parametrize("wrong", [{"flip": 2}, {"scale": (1.2, 0.8)}, {"colour": 1.0}])
def test_a_wrong_choice_is_an_error(wrong: dict):
    with pytest.raises(ValueError, match="must be in"):
        Augmentations(**wrong)


def test_a_whole_video_must_be_cut_first():
    clip = replace(Clips(1, side=32, num_frames=2)[0], frames=None)

    with pytest.raises(ValueError, match="take a cut"):
        Augmentations()(clip)


def test_some_queries_are_kept_and_others_in_another_epoch(marked):
    named, instances = [f"thing {number}" for number in range(9)], marked.queries[0].instances
    queries = [Query(name, instances if number < 5 else []) for number, name in enumerate(named)]
    sample = replace(marked, queries=[*queries, Query("unknown", None)])
    choose = ChooseQueries(positives=2, negatives=3)

    chosen = []
    for epoch in range(12):
        choose.set_epoch(epoch)
        kept = choose(sample).queries
        assert [query.is_negative for query in kept] == [False] * 2 + [True] * 3
        chosen.append([query.phrase for query in kept])

    assert {phrase for phrases in chosen for phrase in phrases} == set(named)
    assert [query.phrase for query in choose(sample).queries] == chosen[-1]
    with pytest.raises(ValueError, match="no queries"):
        ChooseQueries(0, 0)


def test_half_of_the_negatives_are_of_a_kind_that_is_shown(marked):
    def category(name, above, instances=()):
        return Query(name, list(instances), details={"supercategory": above})

    shown = category("dog", "animal", marked.queries[0].instances)
    animals = [category(name, "animal") for name in ("cat", "cow", "horse")]
    others = [category(f"thing {number}", "thing") for number in range(30)]
    sample = replace(marked, queries=[*others, shown, *animals])
    choose = ChooseQueries(positives=1, negatives=4)

    seen: set[str] = set()
    for epoch in range(20):
        choose.set_epoch(epoch)
        negatives = [each for each in choose(sample).queries if each.is_negative]
        assert len(negatives) == 4
        assert sum(each.details["supercategory"] == "animal" for each in negatives) >= 2
        seen.update(each.phrase for each in negatives)

    assert {"cat", "cow", "horse"} < seen
    assert len(seen) > 20
    alone = replace(marked, queries=[shown, animals[0], *others[:1]])
    assert [each.phrase for each in choose(alone).queries] == ["dog", "cat", "thing 0"]


def test_instances_are_chosen_by_name_and_epoch_and_queries_say_so():
    sample = next(each for each in Scenes(9) if sum(len(q.instances) for q in each.queries) > 3)
    choose = ChooseInstances(2, seed=3)

    once, again = choose(sample), choose(sample)
    everything = ChooseInstances(99)(sample)
    chosen = []
    for epoch in range(9):
        choose.set_epoch(epoch)
        chosen.append([query.instances for query in choose(sample).queries])

    assert once == again
    assert everything == sample
    assert [query.phrase for query in once.queries] == [query.phrase for query in sample.queries]
    assert sum(len(query.instances) for query in once.queries) == 2
    for query, whole in zip(once.queries, sample.queries, strict=True):
        assert all(instance in whole.instances for instance in query.instances)
        assert query.is_exhaustive == (len(query.instances) == len(whole.instances))
    assert any(each != chosen[0] for each in chosen)
