"""Video object segmentation in folders: DAVIS 2017, MOSE, LVOS and YouTube-VOS.

    JPEGImages/{video}/00000.jpg    Annotations/{video}/00000.png

The values of a PNG are the numbers of the objects. Frames are numbered by their place among the
pictures, whatever their names: YouTube-VOS has every fifth of a video.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .clips import ClipReader, Cut, positions_of, read_palette
from .files import exists, join, list_names, read_bytes, read_json, write_image, write_json
from .loading import Record
from .masks_rle import decode_rle
from .samples import ClipQuery, ClipSample, Masklet
from .track_writers import davis_palette
from .video import natural_order


class VideoFolders(ClipReader):
    """Videos with a folder of frames and one of masks each.

    Objects are one query without phrase. What a `meta.json` says of an object is in its `details`.

    Args:
        frames: Folder of the folders of frames.
        annotations: Folder of the folders of masks.
        videos: Names; by default, of all folders of frames.
        meta: A JSON file `{"videos": {video: {"objects": {number: {...}}}}}`, if there is one.
        cut, pixels: As for `ClipReader`.
    """

    source = "folders"
    void: int | None = None

    def __init__(
        self,
        frames: str,
        annotations: str,
        videos: list[str] | None = None,
        meta: str | None = None,
        cut: Cut | None = None,
        pixels: bool = True,
    ):
        super().__init__(cut, pixels)
        self.frames, self.annotations = str(frames), str(annotations)
        self.videos, self.meta = videos, meta

    def __str__(self) -> str:
        return self.frames

    def records(self) -> Iterator[tuple[str, Record]]:
        meta = read_json(self.meta) if self.meta and exists(self.meta) else {}
        for name in self.videos if self.videos is not None else list_names(self.frames):
            about = meta.get("videos", {}).get(name, {})
            yield name, {"video": name, "objects": about.get("objects", {})}

    def read(self, record: Record) -> ClipSample:
        name = record["video"]
        frames_folder = join(self.frames, name)
        frames = sorted(list_names(frames_folder, "*.jpg"), key=natural_order)
        masks_folder = join(self.annotations, name)
        paths = positions_of(list_names(masks_folder, "*.png"), frames, masks_folder)
        annotated = sorted(paths)
        if not annotated:
            raise ValueError(f"{masks_folder} has no masks.")
        chosen = self.choose_frames(name, len(frames), annotated)
        size, rles, ignored = None, {}, {}
        for frame in annotated if chosen is None else chosen:
            if frame not in paths:
                continue
            masks, void, size = read_palette(paths[frame], size, self.void)
            if void is not None:
                ignored[frame] = void
            for number, rle in masks.items():
                rles.setdefault(number, {})[frame] = rle
        objects = record["objects"]
        masklets = [
            Masklet(rles[number], number, details=objects.get(str(number), {}))
            for number in sorted(rles)
        ]
        sample = ClipSample(
            source=self.source,
            source_id=name,
            size=size or (0, 0),
            num_frames=len(frames),
            annotated_frames=annotated,
            queries=[ClipQuery(None, masklets, is_exhaustive=False)],
            frame_indices=chosen,
            frame_names=[Path(frame).stem for frame in frames],
            ignored=ignored,
        )
        return self.add_frames(sample, [join(frames_folder, frame) for frame in frames])


class Davis2017(VideoFolders):
    """DAVIS 2017. Pixels of value 255 are void.

    Args:
        folder: With `JPEGImages`, `Annotations` and `ImageSets/2017`.
        split: "train", "val" or "test-dev".
        resolution: "480p" or "Full-Resolution".
        options: As for `VideoFolders`.
    """

    source = "davis2017"
    void = 255

    def __init__(self, folder: str, split: str = "val", resolution: str = "480p", **options: Any):
        listed = join(str(folder), "ImageSets", "2017", f"{split}.txt")
        super().__init__(
            join(str(folder), "JPEGImages", resolution),
            join(str(folder), "Annotations", resolution),
            videos=read_bytes(listed).decode().split(),
            **options,
        )


class SplitFolders(VideoFolders):
    """Videos below `{split}/JPEGImages` and `{split}/Annotations`.

    Args:
        folder: With a folder for each split.
        split: "train" or "valid".
        options: As for `VideoFolders`.
    """

    meta_name = "{split}/meta.json"

    def __init__(self, folder: str, split: str = "valid", **options: Any):
        folder = str(folder)
        super().__init__(
            join(folder, split, "JPEGImages"),
            join(folder, split, "Annotations"),
            meta=join(folder, self.meta_name.format(split=split)),
            **options,
        )


class Mose(SplitFolders):
    """MOSE, version 1 and 2. Only the first frame of a video of "valid" has masks."""

    source = "mose"
    meta_name = "meta_{split}.json"


class Lvos(SplitFolders):
    """LVOS, version 2."""

    source = "lvos"
    meta_name = "{split}_meta.json"


class YoutubeVos(SplitFolders):
    """YouTube-VOS 2018 and 2019: an object's first mask is in the frame where it appears."""

    source = "youtube_vos"


FORMS = {"davis2017": Davis2017, "mose": Mose, "lvos": Lvos, "youtube_vos": YoutubeVos}


def write_video_folders(
    clips: Iterable[ClipSample], folder: str | Path, form: str = "davis2017", split: str = "val"
) -> None:
    """Write clips in a form that the readers above read.

    Args:
        clips: With video; all masklets are written, with their numbers as values.
        folder: To write to.
        form: "davis2017", "mose", "lvos" or "youtube_vos".
        split: "val" for DAVIS, "valid" for the others, ...
    """
    if form not in FORMS:
        raise ValueError(f"form is one of {list(FORMS)}, not {form!r}.")
    folder, names, meta = Path(folder), [], {}
    if form == "davis2017":
        frames, annotations = folder / "JPEGImages" / "480p", folder / "Annotations" / "480p"
    else:
        frames, annotations = folder / split / "JPEGImages", folder / split / "Annotations"
    for clip in clips:
        name = str(clip.source_id)
        names.append(name)
        if clip.video is None:
            raise ValueError(f"Clip {name} was read without pixels.")
        stems = clip.frame_names or [f"{number:05d}" for number in range(clip.num_frames)]
        for frame in clip.video:
            write_image(frames / name / f"{stems[frame.index]}.jpg", frame.pixels)
        for number in clip.annotated_frames:
            write_palette(clip, number, annotations / name / f"{stems[number]}.png")
        meta[name] = {"objects": {str(each.source_id): each.details for each in clip.masklets}}
    if form == "davis2017":
        listed = folder / "ImageSets" / "2017" / f"{split}.txt"
        listed.parent.mkdir(parents=True, exist_ok=True)
        listed.write_text("".join(f"{name}\n" for name in names))
    else:
        write_json(folder / FORMS[form].meta_name.format(split=split), {"videos": meta})


def write_palette(clip: ClipSample, frame: int, path: Path) -> None:
    """Write the masks of one frame as a PNG with DAVIS's palette."""
    labels = np.zeros(clip.size, dtype=np.uint8)
    if frame in clip.ignored:
        labels[decode_rle(clip.ignored[frame])] = 255
    for masklet in clip.masklets:
        if frame in masklet.rles:
            number = masklet.source_id
            if not isinstance(number, int) or not 0 < number < 255:
                raise ValueError(f"{number!r} is no number for a PNG of 8 bits: 1 to 254 are.")
            labels[decode_rle(masklet.rles[frame])] = number
    picture = Image.fromarray(labels)
    picture.putpalette(davis_palette())
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
