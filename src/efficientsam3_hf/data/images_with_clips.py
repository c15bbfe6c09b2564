"""Images and clips in one dataset, for what learns from both at once.

data = ImagesWithClips(Scenes(100), Clips(10), images_per_clip=4)
data[0]  # four images and a clip
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from .collators import usable_samples
from .loading import WithoutGaps, shared_number
from .samples import ClipSample


class ImagesWithClips(Dataset):
    """Samples that are lists: some images, and after them a clip.

    An epoch has each image once, in groups that are others in each; the last is filled up with
    images of the first. Clips take turns: none comes a second time before all have come once,
    which may take several epochs or a part of one. All of it depends on seed and epoch alone. In
    place of a sample that cannot be read stands the next of its dataset.

    Args:
        images: Samples by number.
        clips: Likewise; of any other length.
        images_per_clip: Images of a sample.
        seed: Another one makes other groups.
    """

    def __init__(self, images: Any, clips: Any, images_per_clip: int = 4, seed: int = 0):
        for name, dataset in (("images", images), ("clips", clips)):
            if isinstance(dataset, IterableDataset):
                raise ValueError(
                    f"The {name} come as a stream, and only samples by number can be grouped: load "
                    "them without streaming."
                )
        if images_per_clip < 1:
            raise ValueError(f"images_per_clip={images_per_clip} must be 1 or more.")
        self.datasets = (WithoutGaps(images), WithoutGaps(clips))
        self.images_per_clip, self.seed = images_per_clip, seed
        self.epoch = shared_number()

    def __len__(self) -> int:
        return -(-len(self.datasets[0]) // self.images_per_clip)

    def set_epoch(self, epoch: int) -> None:
        """Choose the groups of this epoch, and what the datasets choose anew in each."""
        self.epoch.fill_(epoch)
        for dataset in self.datasets:
            dataset.set_epoch(epoch)

    def __getitem__(self, index: int) -> list[Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"There is no sample {index} among {len(self)}.")
        images, clips = self.datasets
        epoch, first = int(self.epoch), index * self.images_per_clip
        order = shuffled(len(images), self.seed, epoch, 0)
        places = range(first, first + self.images_per_clip)
        turn, place = divmod(epoch * len(self) + index, len(clips))
        clip = shuffled(len(clips), self.seed, turn, 1)[place]
        return [
            *(images[int(order[place % len(images)])] for place in places),
            clips[int(clip)],
        ]


class ImagesWithClipsCollator:
    """A batch with `images` and `clips`, each as a collator of its own makes it.

    Takes samples of `ImagesWithClips`, and images or clips alone. What there is none of is not in
    the batch.

    Args:
        images: Such as an `ImageCollator`.
        clips: Such as a `ClipCollator`.
    """

    def __init__(
        self, images: Callable[[list], dict[str, Any]], clips: Callable[[list], dict[str, Any]]
    ):
        self.images, self.clips = images, clips

    @property
    def augment(self) -> Sequence[Any]:
        """Both collators' changes, which a trainer tells the epoch."""
        return [
            change for each in (self.images, self.clips) for change in getattr(each, "augment", ())
        ]

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        groups = (sample if isinstance(sample, list) else [sample] for sample in samples)
        usable = usable_samples([sample for group in groups for sample in group])
        clips = [sample for sample in usable if isinstance(sample, ClipSample)]
        images = [sample for sample in usable if not isinstance(sample, ClipSample)]
        batch = {}
        if images:
            batch["images"] = self.images(images)
        if clips:
            batch["clips"] = self.clips(clips)
        return batch


@lru_cache(maxsize=4)
def shuffled(length: int, *seeds: int) -> np.ndarray:
    """The numbers below a length in a random order, which is the same for the same seeds."""
    return np.random.default_rng(seeds).permutation(length)
