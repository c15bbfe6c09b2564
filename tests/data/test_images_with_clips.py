"""Images and clips in one dataset."""

from collections import Counter

import pytest

from efficientsam3_hf.data.images_with_clips import ImagesWithClips, ImagesWithClipsCollator
from efficientsam3_hf.data.loading import Reader, WithoutGaps, load
from efficientsam3_hf.data.synthetic import Clips, Scenes


class Videos(Reader):
    def records(self):
        yield "one", {}


def epochs_of(dataset: ImagesWithClips, epochs: int) -> list[list[list]]:
    return [[dataset[index] for index in range(len(dataset))] for _ in in_epochs(dataset, epochs)]


def in_epochs(dataset: ImagesWithClips, epochs: int):
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        yield epoch


@pytest.mark.parametrize(("images", "clips", "per_clip"), [(10, 3, 4), (4, 30, 2), (2, 1, 5)])
def test_an_epoch_has_every_image_and_clips_take_turns(images, clips, per_clip):
    dataset = ImagesWithClips([f"i{n}" for n in range(images)], [f"c{n}" for n in range(clips)])
    dataset.images_per_clip = per_clip

    epochs = epochs_of(dataset, 4)

    for samples in epochs:
        assert all(len(sample) == per_clip + 1 for sample in samples)
        counts = Counter(each for sample in samples for each in sample[:-1])
        assert len(counts) == images
        assert sum(counts.values()) - images < per_clip
    used = Counter(sample[-1] for samples in epochs for sample in samples)
    numbers = [used[f"c{n}"] for n in range(clips)]
    assert max(numbers) - min(numbers) <= 1


def test_groups_depend_on_seed_and_epoch_alone():
    def groups(seed: int):
        return epochs_of(ImagesWithClips(range(12), range(5), 3, seed), 3)

    first, same, other = groups(0), groups(0), groups(1)

    assert first == same != other
    assert first[0] != first[1]
    later = ImagesWithClips(range(12), range(5), 3, 0)
    later.set_epoch(2)
    assert [later[index] for index in (3, 1)] == [first[2][3], first[2][1]]


def test_the_next_stands_in_for_what_cannot_be_read():
    dataset = ImagesWithClips([None, 1, None, None], [None, "clip"], images_per_clip=4)

    assert dataset[0] == [1, 1, 1, 1, "clip"]
    with pytest.raises(ValueError, match="None of the 2 samples"):
        ImagesWithClips([1], [None, None])[0]
    assert list(WithoutGaps([None, 1, None, 2, None])) == [1, 1, 2, 2, 1]


def test_epochs_reach_the_datasets():
    class Told(list):
        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

    told = Told([1, 2])
    ImagesWithClips(told, [1]).set_epoch(3)

    assert told.epoch == 3


def test_what_is_no_dataset_by_number_is_an_error():
    stream = load(Videos(), streaming=True)
    with pytest.raises(ValueError, match="The clips come as a stream"):
        ImagesWithClips([1], stream)
    with pytest.raises(ValueError, match="1 or more"):
        ImagesWithClips([1], [1], images_per_clip=0)
    with pytest.raises(IndexError):
        ImagesWithClips([1], [1])[1]


def test_a_batch_has_images_and_clips_apart():
    dataset = ImagesWithClips(Scenes(3, side=32), Clips(2, side=32, num_frames=2), 2)
    collate = ImagesWithClipsCollator(list, list)

    both = collate([dataset[0], dataset[1]])

    assert [len(both[name]) for name in ("images", "clips")] == [4, 2]
    names = [image.source_id for sample in (dataset[0], dataset[1]) for image in sample[:-1]]
    assert [image.source_id for image in both["images"]] == names
    assert collate([dataset.datasets[1][0]]).keys() == {"clips"}
    assert collate([None, dataset.datasets[0][0]]).keys() == {"images"}
