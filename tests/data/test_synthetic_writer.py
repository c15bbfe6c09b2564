"""The synthetic world in the form of each dataset."""

import pytest

from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.synthetic import Clips, Scenes
from efficientsam3_hf.data.synthetic_world import World
from efficientsam3_hf.data.synthetic_writer import (
    IMAGE_FORMS,
    QUESTIONS,
    VIDEO_FORMS,
    write_synthetic,
)


@pytest.mark.parametrize("form", IMAGE_FORMS)
def test_scenes_are_written_in_each_form(tmp_path, form: str):
    reader = write_synthetic(tmp_path, form, "test", count=4, seed=2, side=48)

    samples = list(load(reader, on_error="raise"))

    scenes = Scenes(4, "test", seed=2, side=48, ask=QUESTIONS.get(form, "anything"))
    for sample, scene in zip(samples, (scenes[index] for index in range(4)), strict=True):
        assert masks(sample) == masks(scene)
        assert {q.phrase for q in sample.queries} == {q.phrase for q in scene.queries}


@pytest.mark.parametrize("form", VIDEO_FORMS)
def test_clips_are_written_in_each_form(tmp_path, form: str):
    reader = write_synthetic(tmp_path, form, "val", count=2, side=48, num_frames=5)

    samples = list(load(reader, on_error="raise"))

    every = 4 if form.startswith("sav") else 1
    ask = QUESTIONS.get(form, "anything")
    clips = Clips(2, "val", side=48, num_frames=5, annotate_every=every, ask=ask)
    for sample, clip in zip(samples, (clips[index] for index in range(2)), strict=True):
        # Some forms have no place for an object that is never seen.
        found = [each.rles for each in sample.masklets if each.rles]
        assert found == [each.rles for each in clip.masklets if each.rles]
        assert sum(1 for _ in sample.video) == 5


def test_a_world_of_one_s_own_is_written(tmp_path):
    world = World(
        shapes=("ring",), colours=("red", "blue"), forms=(("colour",), ("colour", "shape"))
    )

    reader = write_synthetic(tmp_path, "saco", count=3, side=48, world=world, most=3)

    phrases = {query.phrase for sample in load(reader) for query in sample.queries}
    assert phrases
    assert {word for phrase in phrases for word in phrase.split()} <= set(world.vocabulary())


def masks(sample) -> set:
    return {each.rle["counts"] for query in sample.queries for each in query.instances}


def test_other_forms_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="form is one of"):
        write_synthetic(tmp_path, "pascal")
