"""Batches that bring the teacher's features along.

collate = CachedTeacherFeatures(cache, ImageCollator(processor, augment=[flips()]))
loader = DataLoader(samples, batch_size=16, num_workers=8, collate_fn=collate)
for batch in loader:
    features = decoded(send_to_device(batch, device), cache)
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from ..data.augmentations import Augmentations
from ..data.collators import usable_samples
from .cache_files import picture_keys
from .teacher_cache import TeacherCache

FEATURES = "teacher_features"


class CachedTeacherFeatures:
    """A collator that adds to what another one gives what the cache has of its pictures.

    It runs in worker processes, on samples by number and on streams alike. What it adds is as small
    as on disk, and goes to the device with the rest of the batch; there `decoded` makes features of
    it. The other collator's only change to pictures may be a flip, if flips are cached.

    Args:
        cache: Of these pictures.
        collate: Gives `pixel_values` of all samples that can be used, in their order: an
            `ImageCollator` or a `ClipCollator`.
    """

    def __init__(self, cache: TeacherCache, collate: Callable[[Sequence[Any]], dict[str, Any]]):
        self.cache, self.collate = cache, collate

    @property
    def augment(self) -> Sequence[Any]:
        """The other collator's changes, which a trainer tells the epoch."""
        return getattr(self.collate, "augment", ())

    def __call__(self, samples: Sequence[Any]) -> dict[str, Any]:
        usable = usable_samples(samples)
        batch = self.collate(usable)
        keys = [key for sample in usable for key in picture_keys(sample)]
        pixels: Tensor = batch["pixel_values"]
        batch[FEATURES] = self.cache.read(keys, pixels.reshape(-1, *pixels.shape[-3:]))
        return batch


def decoded(inputs: Mapping[str, Any], cache: TeacherCache | None) -> dict[str, Tensor] | None:
    """Tokens (pictures, tokens, channels) that a batch brought along, by the names of the parts.

    None if it brought none.
    """
    stored = inputs.get(FEATURES)
    return None if stored is None or cache is None else cache.decode(stored)


def flips(probability: float = 0.5, seed: int = 0) -> Augmentations:
    """The augmentation that a cache with flips allows."""
    return Augmentations(flip=probability, scale=(1.0, 1.0), colour=0.0, seed=seed)
