"""What a reader gives: an image or a clip, with phrases and all that each of them names.

A query is a phrase for one image together with **every** instance of it there. A query without
instances is a negative: the phrase names nothing in the image.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from .masks_rle import Rle, decode_rle
from .video import Video

Box = tuple[float, float, float, float]
Point = tuple[float, float]


@dataclass
class Instance:
    """One object in an image.

    Args:
        box_xyxy: Its box in pixels of the annotated size.
        rle: Its mask, or None where only boxes were annotated.
        points: Points (x, y) on it that the file gives, in pixels.
        is_crowd: Whether this is a group whose members were not told apart.
        source_id: Its number in the file.
        details: What else the file says of it, such as SA-1B's `predicted_iou`.
    """

    box_xyxy: Box
    rle: Rle | None = None
    points: list[Point] = field(default_factory=list)
    is_crowd: bool = False
    source_id: int | str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def mask(self) -> np.ndarray:
        """Boolean (height, width) of the annotated size."""
        if self.rle is None:
            raise ValueError(f"Instance {self.source_id} has a box and no mask.")
        return decode_rle(self.rle)


@dataclass
class Query:
    """A phrase and all that it names in one image.

    Args:
        phrase: None means "anything", as in SA-1B, whose masks have no names.
        instances: Empty for a negative; None where nobody has annotated this phrase.
        is_exhaustive: Whether there is nothing more that the phrase names.
        source_id: Number of the query in the file; of the category, where it is a category's name.
        details: What else the file says of it.
    """

    phrase: str | None
    instances: list[Instance] | None
    is_exhaustive: bool = True
    source_id: int | str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_negative(self) -> bool:
        """Whether it is known that the phrase names nothing here."""
        return self.instances == [] and self.is_exhaustive


@dataclass
class ImageSample:
    """An image with its queries.

    Args:
        source: Name of the format, such as "coco".
        source_id: Number or name of the image there.
        file_name: Of the picture, as the annotations have it.
        size: (height, width) of the annotations. The picture is smaller if it was decoded so.
        queries: Phrases with their instances.
        image: Pixels (height, width, 3), or None where the reader was told to leave them.
        covered: Where on its canvas the picture lies, as a box in pixels of `size`; None for all
            of it.
    """

    source: str
    source_id: int | str
    file_name: str
    size: tuple[int, int]
    queries: list[Query] = field(default_factory=list)
    image: np.ndarray | None = None
    covered: Box | None = None


@dataclass
class Masklet:
    """One object through a clip.

    Args:
        rles: Its mask in each annotated frame where it can be seen, by number of the frame.
        source_id: Its number in the file.
        details: What else the file says of it.
    """

    rles: dict[int, Rle]
    source_id: int | str | None = None
    details: dict[str, Any] = field(default_factory=dict)


@dataclass
class ClipQuery:
    """A phrase and all masklets that it names in one clip; fields as in `Query`."""

    phrase: str | None
    masklets: list[Masklet] | None
    is_exhaustive: bool = True
    source_id: int | str | None = None
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def is_negative(self) -> bool:
        """Whether it is known that the phrase names nothing here."""
        return self.masklets == [] and self.is_exhaustive


@dataclass
class ClipSample:
    """A video, or a cut of it, with its queries. Frames are numbered as in the whole video.

    Args:
        source: Name of the format, such as "sav".
        source_id: Number or name of the video there.
        size: (height, width) of the annotations.
        num_frames: Of the whole video.
        annotated_frames: Frames that were annotated, whether an object is seen in them or not.
        queries: Phrases with their masklets.
        video: Where frames come from, as they are asked for; None if they were left.
        frame_indices: Frames of this cut; None stands for the whole video.
        frames: Their pixels (height, width, 3).
        frame_names: Of all frames of the video, without ending, where they are files.
        fps: Frames a second, where it is known.
        ignored: Void pixels of a frame, that count for nothing.
    """

    source: str
    source_id: int | str
    size: tuple[int, int]
    num_frames: int
    annotated_frames: list[int]
    queries: list[ClipQuery] = field(default_factory=list)
    video: Video | None = None
    frame_indices: list[int] | None = None
    frames: list[np.ndarray] | None = None
    frame_names: list[str] | None = None
    fps: float | None = None
    ignored: dict[int, Rle] = field(default_factory=dict)

    @property
    def masklets(self) -> list[Masklet]:
        """Those of all queries."""
        return [masklet for query in self.queries for masklet in query.masklets or []]
