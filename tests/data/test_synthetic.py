"""The synthetic world: exact, repeatable, and hard where it should be."""

import time
from collections import Counter

import numpy as np
import pytest

from efficientsam3_hf.data.masks_rle import decode_rle, rle_box
from efficientsam3_hf.data.synthetic import CATEGORIES, Clips, Scenes, vocabulary
from efficientsam3_hf.data.synthetic_phrases import FORMS, WORDS
from efficientsam3_hf.data.synthetic_shapes import COLOURS, SHAPES, silhouette


@pytest.fixture(scope="module")
def scenes():
    dataset = Scenes(250, side=160)
    return [dataset[index] for index in range(len(dataset))]


def test_a_scene_is_the_same_each_time():
    first, second = Scenes(9, seed=3)[5], Scenes(9, seed=3)[5]

    np.testing.assert_array_equal(first.image, second.image)
    assert first.queries == second.queries


def test_splits_seeds_and_scenes_share_no_image():
    images = [
        Scenes(8, split=split, seed=seed, side=96)[index].image.tobytes()
        for split in ("train", "val", "test")
        for seed in (0, 1)
        for index in range(8)
    ]

    assert len(set(images)) == len(images)


def test_boxes_points_and_masks_agree(scenes):
    for sample in scenes[:60]:
        for query in sample.queries:
            for instance in query.instances:
                mask = instance.mask
                (x, y) = instance.points[0]
                assert mask.shape == sample.size == sample.image.shape[:2]
                assert mask[int(y), int(x)]
                assert instance.box_xyxy == rle_box(instance.rle)


def test_masks_of_all_things_do_not_overlap_and_number_one_to_twelve():
    dataset = Scenes(150, side=96, ask="anything")

    counts, numbers = [], []
    for sample in (dataset[index] for index in range(150)):
        (query,) = sample.queries
        assert query.phrase is None
        assert sum(instance.mask.astype(int) for instance in query.instances).max() == 1
        counts.append(len(query.instances))
        numbers += [instance.source_id for instance in query.instances]

    assert len(set(numbers)) == len(numbers)
    assert min(counts) == 1
    assert max(counts) == 12


def test_pixels_of_a_thing_have_the_colour_that_the_phrase_says(scenes):
    checked = 0
    for sample in scenes:
        for query in sample.queries:
            words = (query.phrase or "").split()
            if words[0] != "plain" or words[1] not in COLOURS or not query.instances:
                continue
            mean = np.mean([sample.image[each.mask].mean(0) for each in query.instances], axis=0)
            assert np.abs(mean - COLOURS[words[1]]).max() < 75
            checked += 1

    assert checked > 10


def test_masks_have_the_area_of_their_shape():
    # (a circle of radius 0.95, a square of half-width 0.82) in units of the radius
    expected = {"circle": np.pi * 0.95**2, "square": 1.64**2, "oval": np.pi * 0.5}
    for shape, area in expected.items():
        dataset = Scenes(1)
        thing = next(
            thing
            for thing in drawn_things(dataset.seed)
            if thing.shape == shape and min(thing.centre) > 0.3 and max(thing.centre) < 0.7
        )
        outline = silhouette(thing, 600)
        assert outline.area == pytest.approx(area * (thing.radius * 600) ** 2, rel=0.02)
        assert np.count_nonzero(outline.inside) == outline.area


def drawn_things(seed: int):
    from efficientsam3_hf.data.synthetic import new_thing

    generator = np.random.default_rng(seed)
    while True:
        yield new_thing(generator)


def test_negatives_are_as_many_as_positives_and_have_the_same_forms(scenes):
    forms = {True: Counter(), False: Counter()}
    for sample in scenes:
        for query in sample.queries:
            forms[query.is_negative][len(query.phrase.split()), "object" in query.phrase] += 1

    positive, negative = (sum(forms[key].values()) for key in (False, True))
    assert abs(positive - negative) < 0.05 * negative
    for form, count in forms[True].items():
        share = count / negative
        assert forms[False][form] / positive == pytest.approx(share, abs=0.08)


def test_most_negatives_differ_from_a_thing_in_one_word(scenes):
    shared = sum(
        bool(set(negative.phrase.split()) & set(positive.phrase.split()) - {"object", "thing"})
        for sample in scenes
        for negative in sample.queries
        if negative.is_negative
        for positive in sample.queries
        if not positive.is_negative
    )
    assert shared > 0.2 * len(scenes)


def test_phrases_often_name_several_and_are_made_of_the_vocabulary(scenes):
    words = set(vocabulary())
    counts = [
        len(query.instances)
        for sample in scenes
        for query in sample.queries
        if not query.is_negative
    ]

    assert np.mean(counts) > 1.4
    assert all(set(query.phrase.split()) <= words for each in scenes for query in each.queries)
    assert {name for form in FORMS for name in form} == set(WORDS)


def test_detection_asks_for_each_shape_in_each_image():
    sample = Scenes(3, ask="shapes", side=96)[1]

    assert [query.source_id for query in sample.queries] == list(CATEGORIES)
    assert [query.phrase for query in sample.queries] == list(SHAPES)
    assert any(query.is_negative for query in sample.queries)


def test_clips_hold_the_events_that_trackers_fail_at():
    dataset = Clips(60, side=96, num_frames=16)
    kinds, gaps, leaves = Counter(), 0, 0
    for sample in (dataset[index] for index in range(60)):
        for masklet in sample.masklets:
            kinds[masklet.details["motion"]] += 1
            seen = sorted(masklet.rles)
            has_gap = seen != list(range(seen[0], seen[-1] + 1))
            gaps += masklet.details["motion"] == "hide" and has_gap
            leaves += masklet.details["motion"] == "leave" and has_gap

    assert set(kinds) == {"drift", "leave", "cross", "hide", "pass"}
    assert kinds["leave"] == leaves
    assert gaps > 0.8 * kinds["hide"]


def test_clips_are_annotated_as_often_as_told_and_masks_do_not_overlap():
    sample = Clips(5, side=96, num_frames=9, annotate_every=4)[2]

    assert sample.annotated_frames == [0, 4, 8]
    assert len(sample.frames) == 9
    for frame in sample.annotated_frames:
        masks = [decode_rle(each.rles[frame]) for each in sample.masklets if frame in each.rles]
        assert np.sum(masks, axis=0).max() == 1
    assert {frame for each in sample.masklets for frame in each.rles} <= {0, 4, 8}


def test_phrases_of_clips_name_what_is_seen_and_negatives_nothing():
    dataset = Clips(20, side=64, num_frames=6, ask="phrases")
    queries = [query for index in range(20) for query in dataset[index].queries]

    assert all(query.phrase for query in queries)
    assert all(masklet.rles for query in queries for masklet in query.masklets)
    assert sum(query.is_negative for query in queries) == 20


def test_scenes_are_drawn_faster_than_models_learn():
    dataset = Scenes(200, side=224)
    dataset[0]  # makes the textures
    start = time.process_time()
    for index in range(50):
        dataset[index]

    # 200 images a second are what is promised of a quiet core; a busy one gets some slack.
    assert (time.process_time() - start) / 50 < 1 / 80


@pytest.mark.parametrize("wrong", [{"split": "dev"}, {"ask": "words"}])
def test_a_wrong_choice_is_an_error(wrong: dict):
    with pytest.raises(ValueError, match="is one of"):
        Scenes(3, **wrong)
    with pytest.raises(IndexError, match="no sample 3 among 3"):
        Scenes(3)[3]
    with pytest.raises(ValueError, match="from 2 to 255, not 1"):
        Clips(3, most=1)
