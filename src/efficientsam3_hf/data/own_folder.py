"""Your own images and videos in a folder, with phrases to look for.

    photos/phrases.txt      a phrase in each line, asked of all
    photos/phrases.json     or {"beach/1.jpg": ["a boat", ...], ...}, each asked of its own

Nobody has annotated them, so the instances of their queries are None.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from .clips import ClipReader, Cut
from .files import exists, image_size, join, list_below, local_path, read_bytes, read_image
from .loading import Reader, Record
from .samples import ClipQuery, ClipSample, ImageSample, Query
from .video import PICTURES, FileVideo, PicturesVideo, Video, natural_order

VIDEOS = (".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v")

Phrases = Sequence[str] | dict[str, Sequence[str]]


class OwnImages(Reader[ImageSample]):
    """Pictures of a folder and of all folders in it.

    Args:
        folder: Of the pictures. May be an address.
        phrases: To ask of all, or of each by its path in the folder; by default those of
            `phrases.json` or `phrases.txt` in the folder.
        upright: Turn photographs as the camera was held.
        least_size: As for `read_image`.
    """

    source = "own"

    def __init__(
        self,
        folder: str,
        phrases: Phrases | None = None,
        upright: bool = True,
        least_size: tuple[int, int] | None = None,
    ):
        self.folder, self.upright, self.least_size = str(folder), upright, least_size
        self.phrases = find_phrases(self.folder) if phrases is None else phrases

    def __str__(self) -> str:
        return self.folder

    def records(self) -> Iterator[tuple[str, Record]]:
        for name in files_of(self.folder, PICTURES):
            yield name, {"name": name}

    def read(self, record: Record) -> ImageSample:
        name = record["name"]
        data = read_bytes(join(self.folder, name))
        size = image_size(data, self.upright)
        image = read_image(data, least_size=self.least_size, upright=self.upright)
        queries = [Query(phrase, None, False) for phrase in phrases_for(self.phrases, name)]
        return ImageSample(self.source, name, name, size, queries, image)


class OwnVideos(ClipReader):
    """Video files of a folder, and folders in it whose pictures are frames.

    Args:
        folder: Of the videos. May be an address.
        phrases: As for `OwnImages`.
        cut: As for `ClipReader`.
    """

    source = "own"

    def __init__(self, folder: str, phrases: Phrases | None = None, cut: Cut | None = None):
        super().__init__(cut)
        self.folder = str(folder)
        self.phrases = find_phrases(self.folder) if phrases is None else phrases

    def __str__(self) -> str:
        return self.folder

    def records(self) -> Iterator[tuple[str, Record]]:
        pictures: dict[str, list[str]] = {}
        for name in files_of(self.folder, PICTURES):
            pictures.setdefault(str(PurePosixPath(name).parent), []).append(name)
        pictures.pop(".", None)  # pictures beside the videos are no video
        names = [*files_of(self.folder, VIDEOS), *pictures]
        for name in sorted(names):
            yield name, {"name": name, "frames": pictures.get(name)}

    def read(self, record: Record) -> ClipSample:
        name, frames = record["name"], record["frames"]
        if frames is None:
            source = local_path(join(self.folder, name))
            video: Video = FileVideo(source)
            count, fps = count_frames(video), video.fps
        else:
            source = [join(self.folder, each) for each in sorted(frames, key=natural_order)]
            video, count, fps = PicturesVideo(source, name), len(frames), None
        first = next(iter(video)).pixels
        sample = ClipSample(
            source=self.source,
            source_id=name,
            size=first.shape[:2],
            num_frames=count,
            annotated_frames=[],
            queries=[ClipQuery(phrase, None, False) for phrase in phrases_for(self.phrases, name)],
            frame_indices=self.choose_frames(name, count, list(range(count))),
            fps=fps,
        )
        return self.add_frames(sample, source)


def count_frames(video: FileVideo) -> int:
    """Frames of a video file by its packets, which are not decoded."""
    with video.opened() as (container, stream):
        return sum(1 for packet in container.demux(stream) if packet.size)


def files_of(folder: str, endings: Sequence[str]) -> list[str]:
    """Paths in a folder and all below it of files with one of these endings."""
    names = []
    for path in list_below(folder, "*"):
        if Path(path).suffix.lower() in endings:
            names.append(path[path.index(folder) + len(folder) :].replace("\\", "/").strip("/"))
    return names


def find_phrases(folder: str) -> Phrases:
    """Phrases that lie in a folder; none, if there is no such file."""
    if exists(join(folder, "phrases.json")):
        return json.loads(read_bytes(join(folder, "phrases.json")))
    if exists(join(folder, "phrases.txt")):
        lines = read_bytes(join(folder, "phrases.txt")).decode().splitlines()
        return [line.strip() for line in lines if line.strip()]
    return []


def phrases_for(phrases: Phrases, name: str) -> Sequence[str]:
    """Those that are asked of one image or video."""
    return phrases.get(name, []) if isinstance(phrases, dict) else phrases
