"""Frames of a video, one at a time: from a file, a folder of pictures, or what is in memory.

    for frame in open_video("street.mp4", start=100, step=5):
        print(frame.index, frame.time, frame.pixels.shape)

Files are decoded by PyAV: `pip install "efficientsam3-hf[video]"`.
"""

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .files import is_remote, read_image, to_rgb

# Packets that may come between a frame and the one shown next.
MOST_REORDERED = 64

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass
class Frame:
    """One picture of a video.

    Args:
        index: Its number in the video, whatever was skipped before it.
        time: Seconds since the start, where the video has times.
        pixels: (height, width, 3), 8 bits each.
    """

    index: int
    time: float | None
    pixels: np.ndarray


class Video:
    """Frames `start`, `start + step`, ... before `stop`; may be iterated more than once.

    Args:
        start: First frame.
        stop: Frame to stop before; None goes on to the end.
        step: 1 takes every frame, 2 every second, ...
    """

    fps: float | None = None

    def __init__(self, start: int = 0, stop: int | None = None, step: int = 1):
        if start < 0 or step < 1 or (stop is not None and stop <= start):
            raise ValueError(
                f"start={start}, stop={stop}, step={step} take no frame: start counts from 0, stop "
                "comes after it, and step is 1 or more."
            )
        self.start, self.stop, self.step = start, stop, step

    def __iter__(self) -> Iterator[Frame]:
        wanted = False
        for frame in self.frames():
            if (frame.index - self.start) % self.step == 0:
                wanted = True
                yield frame
        if not wanted:
            raise ValueError(no_frames(self, self.start))

    def frames(self) -> Iterator[Frame]:
        """Every frame from `start` to `stop`; those that `step` skips may be left out."""
        raise NotImplementedError


class PicturesVideo(Video):
    """Pictures of one size, in order.

    Args:
        pictures: Arrays or tensors (height, width, 3) or (3, height, width), PIL images, or paths.
        name: What to call it in messages.
        span: As for `Video`.
    """

    def __init__(self, pictures: Sequence[Any], name: str, **span):
        super().__init__(**span)
        self.pictures, self.name = pictures, name

    def __str__(self) -> str:
        return self.name

    def frames(self) -> Iterator[Frame]:
        first_size = None
        for index in range(len(self.pictures))[self.start : self.stop : self.step]:
            pixels = read_picture(self.pictures[index])
            first_size = first_size or pixels.shape
            if pixels.shape != first_size:
                raise ValueError(
                    f"Frame {index} of {self} has {pixels.shape[1]} x {pixels.shape[0]} pixels, "
                    f"those before it have {first_size[1]} x {first_size[0]}."
                )
            yield Frame(index, None, pixels)


class FileVideo(Video):
    """A video file, or anything else that FFmpeg opens, such as a stream's address.

    Args:
        source: Path or address.
        span: As for `Video`. `start` is sought, not decoded to, where the file allows.
    """

    def __init__(self, source: str, **span):
        super().__init__(**span)
        self.source = source
        with self.opened() as (_, stream):
            self.fps = float(stream.average_rate) if stream.average_rate else None
            self.height, self.width = stream.height, stream.width

    def __str__(self) -> str:
        return self.source

    @contextmanager
    def opened(self) -> Iterator[tuple[Any, Any]]:
        """Container and stream of the first video track."""
        av = import_av()
        try:
            container = av.open(self.source)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(f"{self} cannot be read as a video: {error}.") from error
        with container:
            if not container.streams.video:
                raise ValueError(f"{self} holds no video, only {len(container.streams)} others.")
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            yield container, stream

    def frames(self) -> Iterator[Frame]:
        av = import_av()
        start_time = self.time_of(self.start) if self.start else None
        with self.opened() as (container, stream):
            # Else FFmpeg leaves out, in silence, what it cannot decode.
            stream.codec_context.options = {"err_detect": "explode"}
            index = 0
            if start_time is not None:
                container.seek(start_time, stream=stream, backward=True)
                index = self.start
            try:
                for decoded in container.decode(stream):
                    if start_time is not None and decoded.pts < start_time:
                        continue  # between the key frame and the first that is wanted
                    if decoded.is_corrupt:
                        raise ValueError(self.damage(index, "its data are incomplete"))
                    if index >= self.start and (index - self.start) % self.step == 0:
                        yield Frame(index, decoded.time, decoded.to_ndarray(format="rgb24"))
                    index += 1
                    if index == self.stop:  # at once, before what may be damaged is decoded
                        return
            except av.FFmpegError as error:
                raise ValueError(self.damage(index, str(error))) from error

    def damage(self, index: int, reason: str) -> str:
        return (
            f"{self} is damaged at frame {index}: {reason}. Pass stop={index} to use what comes "
            "before."
        )

    def time_of(self, index: int) -> int | None:
        """Time of a frame in units of the stream, or None where times do not tell frames apart.

        Read from the packets, undecoded; these may come in another order than the frames.
        """
        av = import_av()
        with self.opened() as (container, stream):
            if container.format.name == "avi":  # it knows only the order of packets
                return None
            times = []
            try:
                for packet in container.demux(stream):
                    if packet.size == 0:
                        continue  # the end
                    if packet.pts is None:
                        return None
                    times.append(packet.pts)
                    if len(times) > index + MOST_REORDERED:
                        break
            except av.FFmpegError as error:
                raise ValueError(self.damage(len(times), str(error))) from error
        if index >= len(times):
            raise ValueError(f"{self} holds no frames from frame {index} on: it has {len(times)}.")
        return sorted(times)[index]


def open_video(
    source: Any, start: int = 0, stop: int | None = None, step: int = 1
) -> Video | Iterator[Frame]:
    """Frames of a video, decoded as they are asked for.

    Args:
        source: Path of a file, folder of pictures (in the order of the numbers in their names),
            address that FFmpeg opens, array or tensor (frames, height, width, 3) or (frames, 3,
            height, width), sequence of pictures, or any iterator of them, such as a camera's.
        start: First frame.
        stop: Frame to stop before; None goes on to the end.
        step: 1 takes every frame, 2 every second, ...
    """
    span = {"start": start, "stop": stop, "step": step}
    if isinstance(source, str | os.PathLike):
        path = Path(source)
        if path.is_dir():
            return PicturesVideo(pictures_in(path), str(path), **span)
        if not path.is_file() and "://" not in str(source):
            raise FileNotFoundError(f"There is no video {path}.")
        return FileVideo(str(source), **span)
    if isinstance(source, Video):
        if (start, stop, step) != (0, None, 1):
            raise ValueError("A Video has a start, stop and step of its own: open its source anew.")
        return source
    if hasattr(source, "__len__") and hasattr(source, "__getitem__"):
        return PicturesVideo(source, "The video", **span)
    if hasattr(source, "__iter__"):
        Video(**span)  # checks the span
        return number_frames(source, start, stop, step)
    raise TypeError(
        "A video is a path, a sequence of pictures or an iterator of them, not a "
        f"{type(source).__name__}."
    )


def number_frames(
    pictures: Iterator[Any], start: int, stop: int | None, step: int
) -> Iterator[Frame]:
    """Frames out of an iterator, which may have no end."""
    wanted = False
    for index, picture in islice(enumerate(pictures), start, stop, step):
        wanted = True
        yield (picture if isinstance(picture, Frame) else Frame(index, None, read_picture(picture)))
    if not wanted:
        raise ValueError(no_frames("The iterator", start))


def no_frames(name: object, start: int) -> str:
    """What to say of a video that gave none."""
    beyond = f" from frame {start} on" if start else ""
    return f"{name} holds no frames{beyond}."


def pictures_in(folder: Path) -> list[Path]:
    """Pictures of a folder, in the order of the numbers in their names."""
    found = [path for path in folder.iterdir() if path.suffix.lower() in PICTURES]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(PICTURES)}).")
    return sorted(found, key=natural_order)


def natural_order(path: str | Path) -> list[tuple[int, str]]:
    """A key that sorts numbers by value.

    >>> sorted(["a10.png", "a9.png"], key=natural_order)[0]
    'a9.png'
    """
    parts = re.findall(r"\d+|\D+", Path(path).stem)
    return [(int(part), "") if part.isdigit() else (-1, part) for part in parts]


def read_picture(picture: Any) -> np.ndarray:
    """A picture of any kind as (height, width, 3), 8 bits each."""
    if isinstance(picture, str | os.PathLike):
        try:
            if is_remote(picture):
                return read_image(str(picture))
            with Image.open(picture) as opened:
                return to_rgb(opened)
        except OSError as error:
            raise ValueError(f"{picture} is no picture that can be read: {error}.") from error
    if isinstance(picture, Image.Image):
        return to_rgb(picture)
    array = np.asarray(picture.cpu() if hasattr(picture, "cpu") else picture)
    if array.ndim == 3 and array.shape[0] == 3 and array.shape[2] != 3:
        array = array.transpose(1, 2, 0)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            "A frame is (height, width, 3) or (3, height, width) of 8-bit values, not "
            f"{array.shape} of {array.dtype}."
        )
    return np.ascontiguousarray(array)


def import_av() -> Any:
    """PyAV, or an error that says how to get it."""
    try:
        import av
    except ImportError as error:
        raise ImportError(
            'Video files are read and written by PyAV: pip install "efficientsam3-hf[video]".'
        ) from error
    return av
