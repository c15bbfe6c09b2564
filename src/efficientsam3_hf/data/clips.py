"""What readers of videos share: whole videos or cuts of them, and masks as PNG."""

import hashlib
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .files import join, read_labels
from .loading import Reader, shared_number
from .masks_rle import Rle, rle_area, to_rle
from .samples import ClipSample
from .video import FileVideo, open_video


@dataclass(frozen=True)
class Cut:
    """A cut of a video, which begins at an annotated frame.

    Args:
        length: Frames.
        step: 2 takes every second frame, ...
        place: "start", or "random": another in each epoch, the same whenever the epoch is repeated.
        seed: Of the random ones.
    """

    length: int
    step: int = 1
    place: str = "random"
    seed: int = 0

    def __post_init__(self):
        if self.length < 1 or self.step < 1 or self.place not in ("start", "random"):
            raise ValueError(
                f"{self} is no cut: length and step are 1 or more, place is start or random."
            )

    def frames_of(self, name: str, num_frames: int, annotated: list[int], epoch: int) -> list[int]:
        """Numbers of the frames to take out of a video."""
        last = num_frames - 1 - (self.length - 1) * self.step
        starts = [frame for frame in annotated if frame <= last]
        if not starts:
            raise ValueError(
                f"{num_frames} frames, of which {len(annotated)} are annotated, are too few for a "
                f"cut of {self.length} with step {self.step}."
            )
        start = starts[0]
        if self.place == "random":
            digest = hashlib.blake2b(f"{self.seed}/{epoch}/{name}".encode(), digest_size=8).digest()
            start = starts[int.from_bytes(digest, "big") % len(starts)]
        return list(range(start, start + self.length * self.step, self.step))


class BytesVideo(FileVideo):
    """A video file whose bytes are in memory.

    Args:
        data: The file.
        name: What to call it in messages.
        span: As for `Video`.
    """

    def __init__(self, data: bytes, name: str, **span):
        self.data, self.name = data, name
        super().__init__(name, **span)

    def __str__(self) -> str:
        return self.name

    def opened(self) -> Any:
        self.source: Any = io.BytesIO(self.data)  # anew, since it is read from the beginning
        return super().opened()


class ClipReader(Reader[ClipSample]):
    """A reader of videos.

    Args:
        cut: Which frames to take, with their pixels; None gives whole videos, whose frames are
            decoded as they are asked for.
        pixels: False leaves the frames unread.
    """

    source = ""

    def __init__(self, cut: Cut | None = None, pixels: bool = True):
        self.cut, self.pixels = cut, pixels
        self.epoch = shared_number()

    def set_epoch(self, epoch: int) -> None:
        self.epoch.fill_(epoch)

    def choose_frames(self, name: str, num_frames: int, annotated: list[int]) -> list[int] | None:
        """Numbers of the frames of the cut, or None for the whole video."""
        if self.cut is None:
            return None
        return self.cut.frames_of(name, num_frames, annotated, int(self.epoch))

    def add_frames(self, sample: ClipSample, source: Any) -> ClipSample:
        """Give a sample its video and, if it is a cut, the pixels of its frames.

        Args:
            sample: To which they are added.
            source: What `open_video` opens, or the bytes of a file.
        """
        if not self.pixels:
            return sample
        name = str(sample.source_id)
        sample.video = open_source(source, name)
        if sample.frame_indices is not None:
            sample.frames = read_frames(source, sample.frame_indices, name)
            for index, frame in zip(sample.frame_indices, sample.frames, strict=True):
                if frame.shape[:2] != tuple(sample.size):
                    raise ValueError(
                        f"Frame {index} has {frame.shape[:2]} pixels (height, width), its "
                        f"annotations {tuple(sample.size)}."
                    )
        return sample


def open_source(source: Any, name: str, **span) -> Any:
    """The video of what `open_video` opens, or of the bytes of a file, which have no name."""
    if isinstance(source, bytes):
        return BytesVideo(source, name, **span)
    return open_video(source, **span)


def read_frames(source: Any, indices: list[int], name: str) -> list[np.ndarray]:
    """Pixels of evenly spaced frames."""
    step = indices[1] - indices[0] if len(indices) > 1 else 1
    video = open_source(source, name, start=indices[0], stop=indices[-1] + 1, step=step)
    frames = [frame.pixels for frame in video]
    if len(frames) != len(indices):
        raise ValueError(f"The video ends before frame {indices[-1]}.")
    return frames


def read_palette(
    path: str, size: tuple[int, int] | None = None, void: int | None = None
) -> tuple[dict[int, Rle], Rle | None, tuple[int, int]]:
    """Masks by number of the object, void pixels and size of a PNG whose values are numbers.

    Args:
        path: Of the PNG.
        size: (height, width) that it must have.
        void: Value that stands for no object, but for pixels that do not count.
    """
    labels = read_labels(path)
    if size is not None and labels.shape != tuple(size):
        raise ValueError(f"{path} has {labels.shape} pixels (height, width), not {tuple(size)}.")
    values = np.flatnonzero(np.bincount(labels.ravel()))  # far faster than sorting the pixels
    masks = {int(value): to_rle(labels == value, labels.shape) for value in values if value}
    return masks, masks.pop(void, None) if void else None, labels.shape


def seen_masks(masks: Iterable[tuple[int, Any]], size: tuple[int, int]) -> dict[int, Rle]:
    """Run lengths by frame of masks of any form, without those that are None or empty."""
    rles = {frame: to_rle(mask, size) for frame, mask in masks if mask is not None}
    return {frame: rle for frame, rle in rles.items() if rle_area(rle)}


def positions_of(names: list[str], frames: list[str], folder: str) -> dict[int, str]:
    """Path of each annotation by the number of the frame of the same name."""
    numbers = {Path(frame).stem: number for number, frame in enumerate(frames)}
    strange = [name for name in names if Path(name).stem not in numbers]
    if strange:
        raise ValueError(f"{join(folder, strange[0])} is of a frame that is not there.")
    return {numbers[Path(name).stem]: join(folder, name) for name in names}
