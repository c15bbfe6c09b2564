"""Tracks written while they come: COCO RLE as JSON, DAVIS folders of PNG, or a video to look at.

    with RleWriter("tracks.json") as writer:
        for result in model.stream(frames, text=["a red car"]):
            writer.write(result)

A result has `frame_index`, and `object_ids`, `labels`, `scores`, `boxes` and `masks` with one entry
for each object in the frame.
"""

import json
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from ..visualize import draw_instances, to_array
from .masks_rle import import_mask_api, to_rle
from .video import import_av

OVERLAYS = (".mp4", ".mkv", ".mov", ".avi", ".gif")

DAVIS_IDS = 255  # objects that fit into a PNG of 8 bits


class FrameOfTracks(Protocol):
    """What a writer needs to know of a frame."""

    frame_index: int
    object_ids: list[int]
    labels: list[str]
    scores: Any  # (objects,)
    boxes: Any  # (objects, 4) as (x1, y1, x2, y2)
    masks: Any  # (objects, height, width)


class TrackWriter:
    """What writers have in common: they are closed by leaving their `with` block."""

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        """Add one frame.

        Args:
            result: Its objects.
            image: Its picture, for the writers that draw.
        """
        raise NotImplementedError

    def close(self) -> None:
        """Finish the file."""

    def __enter__(self) -> "TrackWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class RleWriter(TrackWriter):
    """One JSON record for each object of each frame, its mask as compressed COCO RLE.

    A path that ends in `.jsonl` gets a record a line, of which a process that dies loses none; any
    other gets one list.

    Args:
        path: File to write.
        video: Name of the video, put into every record; None leaves it out.
        append: Whether to go on with the file of a process that died, in place of starting it. What
            it wrote from the first frame on that comes again is replaced.
    """

    def __init__(self, path: str | Path, video: str | None = None, append: bool = False):
        import_mask_api()  # an error now is better than one after the first frame
        self.video = video
        self.is_list = Path(path).suffix != ".jsonl"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.old: dict[int, int] = {}  # frame of the earlier process -> where its records begin
        end = 0
        if append and Path(path).exists():
            self.old, end = old_records(Path(path))
        self.file = open(path, "r+b" if append and Path(path).exists() else "wb")  # noqa: SIM115
        self.cut(end)

    def cut(self, end: int) -> None:
        """Leave the file as it was when its last record ended there; 0 for none."""
        self.file.truncate(end)
        self.file.seek(end)
        self.is_first = end == 0
        if self.is_list and self.is_first:
            self.file.write(b"[")

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        if result.frame_index in self.old:
            self.cut(self.old[result.frame_index])
            self.old = {}
        masks, boxes, scores = (
            to_array(result.masks),
            to_array(result.boxes),
            to_array(result.scores),
        )
        for row, object_id in enumerate(result.object_ids):
            x1, y1, x2, y2 = (float(side) for side in boxes[row])
            record = {
                "frame_index": result.frame_index,
                "object_id": int(object_id),
                "label": result.labels[row],
                "score": round(float(scores[row]), 6),
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "segmentation": to_rle(masks[row], masks[row].shape),
            }
            if self.video is not None:
                record = {"video": self.video, **record}
            line = json.dumps(record, ensure_ascii=False).encode()
            if self.is_list:
                line = (b"\n" if self.is_first else b",\n") + line
            else:
                line += b"\n"
            self.file.write(line)
            self.is_first = False
        self.file.flush()

    def close(self) -> None:
        if not self.file.closed:
            self.file.write(b"\n]\n" if self.is_list else b"")
            self.file.close()


def old_records(path: Path) -> tuple[dict[int, int], int]:
    """Where the records of each frame begin in a file of tracks, and where the last whole one ends.

    What a process was writing when it died is no whole record. Places lie behind the record before.
    """
    frames: dict[int, int] = {}
    position = end = 0
    is_list = path.suffix != ".jsonl"
    with open(path, "rb") as file:
        for line in file:
            text = line.rstrip(b",\n") if is_list else line
            position += len(line)
            if is_list and text in (b"[", b"]", b""):
                continue
            try:
                frame = json.loads(text)["frame_index"]
            except (ValueError, KeyError, TypeError) as error:
                if line.endswith(b"\n"):
                    raise ValueError(
                        f"{path} holds a line that is no track, and so cannot be appended to: "
                        f"{line[:60]!r}."
                    ) from error
                break
            if not is_list and not line.endswith(b"\n"):
                break
            frames.setdefault(frame, end)
            end = position - len(line) + len(text)
    return frames, end


class DavisWriter(TrackWriter):
    """A PNG for each frame, whose pixels are the numbers of objects, 0 for none.

    Objects are numbered from 1 in the order in which they come, as `numbers` tells, and the text
    chunk `objects` of each PNG. Where two overlap, the pixel goes to the one with the higher score.

    Args:
        folder: Where to write `00000.png`, `00001.png`, ...
        append: Whether to go on with the numbers of a process that died, which lie there.
    """

    def __init__(self, folder: str | Path, append: bool = False):
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.numbers: dict[int, int] = old_numbers(self.folder) if append else {}

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        masks, scores = to_array(result.masks).astype(bool), to_array(result.scores)
        height, width = masks.shape[1:]
        labels = np.zeros((height, width), dtype=np.uint8)
        for object_id in result.object_ids:
            self.numbers.setdefault(int(object_id), len(self.numbers) + 1)
        if len(self.numbers) > DAVIS_IDS:
            raise ValueError(
                f"A PNG in DAVIS layout holds {DAVIS_IDS} objects, and this video has more: write "
                "COCO RLE instead."
            )
        for row in np.argsort(scores, kind="stable"):
            labels[masks[row]] = self.numbers[int(result.object_ids[row])]
        picture = Image.frombytes("P", (width, height), labels.tobytes())
        picture.putpalette(davis_palette())
        text = PngInfo()
        text.add_text("objects", json.dumps(self.numbers))
        path = self.folder / f"{result.frame_index:05d}.png"
        unfinished = path.with_suffix(".unfinished")
        picture.save(unfinished, format="png", pnginfo=text)
        unfinished.replace(path)


def old_numbers(folder: Path) -> dict[int, int]:
    """Object -> number, as the PNGs of an earlier process say.

    Whichever way that went, the last it wrote has the first or the last name.
    """
    paths = sorted(folder.glob("*.png"), key=lambda path: (len(path.name), path.name))
    numbers: dict[int, int] = {}
    for path in {*paths[:1], *paths[-1:]}:
        with Image.open(path) as picture:
            known = json.loads(picture.info.get("objects", "{}"))
        if len(known) >= len(numbers):
            numbers = {int(object_id): number for object_id, number in known.items()}
    return numbers


class OverlayWriter(TrackWriter):
    """A video (`.mp4`, `.mkv`, `.mov`, `.avi`) or `.gif` with the objects drawn on their frames.

    A GIF is kept in memory until it is closed; a video is not. Neither can be appended to: what
    goes on after a process died is written to another file.

    Args:
        path: File to write.
        fps: Frames a second.
    """

    def __init__(self, path: str | Path, fps: float = 24.0):
        if fps <= 0:
            raise ValueError(f"fps={fps} is no number of frames a second: it is more than 0.")
        self.path, self.fps = Path(path), fps
        if self.path.suffix.lower() not in OVERLAYS:
            raise ValueError(f"{path} does not end in {', '.join(OVERLAYS)}: no overlay is so.")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.pictures: list[Image.Image] = []  # of a GIF, which is written at the end
        self.container = self.stream = None
        self.is_gif = self.path.suffix.lower() == ".gif"
        if not self.is_gif:
            self.av = import_av()

    def write(self, result: FrameOfTracks, image: Any = None) -> None:
        if image is None:
            raise ValueError("An overlay needs the picture: writer.write(result, image).")
        captions = [
            f"{object_id} {label}".strip()
            for object_id, label in zip(result.object_ids, result.labels, strict=True)
        ]
        drawn = draw_instances(
            image, result.masks, result.boxes, captions, numbers=list(result.object_ids)
        )
        if self.is_gif:
            self.pictures.append(drawn.quantize(128))
            return
        if self.container is None:
            self.open(drawn.size)
        frame = self.av.VideoFrame.from_image(drawn)
        self.container.mux(self.stream.encode(frame))

    def open(self, size: tuple[int, int]) -> None:
        """Begin the file, when the size of the frames is known."""
        self.container = self.av.open(str(self.path), "w")
        codec = "libx264" if "libx264" in self.av.codecs_available else "mpeg4"
        rate = Fraction(self.fps).limit_denominator(1001)  # finds 30000 / 1001 in 29.97
        self.stream = self.container.add_stream(codec, rate=rate)
        self.stream.width, self.stream.height = (side + side % 2 for side in size)
        self.stream.pix_fmt = "yuv420p"

    def close(self) -> None:
        if self.pictures:
            first, *others = self.pictures
            duration = round(1000 / self.fps)
            first.save(self.path, save_all=True, append_images=others, duration=duration, loop=0)
            self.pictures = []
        if self.container is not None:
            self.container.mux(self.stream.encode())
            self.container.close()
            self.container = None


def open_writers(
    stack: ExitStack,
    name: str,
    fps: float,
    overlay: Path | None = None,
    rle: Path | None = None,
    davis: Path | None = None,
) -> list[TrackWriter]:
    """A writer for each path that is given.

    Args:
        stack: Closes them.
        name: Of the video, for the records.
        fps: Of the overlay.
        overlay: Video or GIF to look at.
        rle: `.json` or `.jsonl`.
        davis: Folder of PNGs.
    """
    writers: list[TrackWriter] = []
    if overlay:
        writers.append(OverlayWriter(overlay, fps))
    if rle:
        writers.append(RleWriter(rle, name))
    if davis:
        writers.append(DavisWriter(davis))
    return [stack.enter_context(writer) for writer in writers]


def davis_palette() -> list[int]:
    """The palette of DAVIS and PASCAL VOC: the bits of a number, dealt out to red, green, blue."""
    palette = []
    for number in range(256):
        channels = [0, 0, 0]
        for position in range(8):
            for channel in range(3):
                channels[channel] |= (number >> (3 * position + channel) & 1) << (7 - position)
        palette += channels
    return palette
