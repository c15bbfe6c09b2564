"""SA-V: videos of 24 frames a second, of which every fourth is annotated.

    train    sav_000001.mp4, sav_000001_manual.json, sav_000001_auto.json in tars or folders
    val      JPEGImages_24fps/{video}/00000.jpg, Annotations_6fps/{video}/000/00000.png, sav_val.txt

Entry j of `masklet` in the JSON belongs to frame 4 j of the video.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .clips import ClipReader, Cut, positions_of, seen_masks
from .files import (
    join,
    list_below,
    list_names,
    local_path,
    read_bytes,
    read_labels,
    write_image,
    write_json,
)
from .loading import Record
from .masks_rle import decode_rle, to_rle
from .samples import ClipQuery, ClipSample, Masklet
from .tar_shards import index_of_tar, pack_tars, read_part, read_tar
from .video import import_av, natural_order

FRAMES_PER_ANNOTATION = 4

FPS = 24.0

# Lists of the JSON with an entry for each masklet, kept as its details.
DETAILS = (
    "masklet_type",
    "masklet_size_rel",
    "masklet_size_abs",
    "masklet_size_bucket",
    "masklet_visibility_changes",
    "masklet_first_appeared_frame",
    "masklet_frame_count",
    "masklet_edited_frame_count",
    "masklet_stability_score",
)


class SavVideos(ClipReader):
    """Videos of SA-V as it is for training.

    Args:
        folder: Of tars, or of the files, at whatever depth. May be an address; tars there are
            streamed, and single videos fetched when they are asked for, and kept.
        masklets: "manual", "auto" or "both". Videos that have none of these are left out.
        tars: Which of the tars, as a pattern.
        cut, pixels: As for `ClipReader`.
    """

    source = "sav"

    def __init__(
        self,
        folder: str,
        masklets: str = "manual",
        tars: str = "*.tar",
        cut: Cut | None = None,
        pixels: bool = True,
    ):
        if masklets not in ("manual", "auto", "both"):
            raise ValueError(f'masklets is "manual", "auto" or "both", not {masklets!r}.')
        super().__init__(cut, pixels)
        self.folder, self.masklets, self.tars = str(folder), masklets, tars

    def __str__(self) -> str:
        return self.folder

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of masklets, which each have a file of their own."""
        return ("manual", "auto") if self.masklets == "both" else (self.masklets,)

    def part_of(self, file_name: str) -> tuple[str, str] | None:
        """Video and kind of a file, if it is of any use."""
        stem, ending = file_name.rsplit(".", 1) if "." in file_name else (file_name, "")
        if ending == "mp4":
            return stem, "mp4"
        name, _, kind = stem.rpartition("_")
        return (name, kind) if ending == "json" and kind in self.kinds else None

    def annotated(self, records: Iterable[tuple[str, Record]]) -> Iterator[tuple[str, Record]]:
        """Records that have masklets, or are damaged."""
        for name, record in records:
            if "damage" in record or any(record.get(kind) is not None for kind in self.kinds):
                yield name, record

    def shards(self) -> list[str]:
        return list_below(self.folder, self.tars)

    def records(self) -> Iterator[tuple[str, Record]]:
        shards = self.shards()
        for shard in shards:
            yield from self.annotated(index_of_tar(shard, self.part_of))
        if shards:
            return
        videos: dict[str, Record] = {}
        for path in list_below(self.folder, "*.*"):
            part = self.part_of(Path(path).name)
            if part is not None:
                name, kind = part
                videos.setdefault(name, {"name": name})[kind] = path
        yield from self.annotated(sorted(videos.items()))

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        return self.annotated(read_tar(shard, self.part_of, ("mp4", *self.kinds)))

    def read(self, record: Record) -> ClipSample:
        contents = {
            kind: json.loads(read_part(record, kind))
            for kind in self.kinds
            if record.get(kind) is not None or "damage" in record
        }
        first = next(iter(contents.values()))
        size = (int(first["video_height"]), int(first["video_width"]))
        num_frames = int(first["video_frame_count"])
        name = first["video_id"]
        entries = len(first["masklet"])
        annotated = [FRAMES_PER_ANNOTATION * entry for entry in range(entries)]
        if annotated and annotated[-1] >= num_frames:
            raise ValueError(
                f"{entries} annotations at every {FRAMES_PER_ANNOTATION}th frame do not fit "
                f"{num_frames} frames."
            )
        chosen = self.choose_frames(name, num_frames, annotated)
        wanted = annotated if chosen is None else sorted(set(annotated) & set(chosen))
        masklets = [
            masklet
            for kind, content in contents.items()
            for masklet in read_masklets(content, kind, size, wanted)
        ]
        sample = ClipSample(
            source=self.source,
            source_id=name,
            size=size,
            num_frames=num_frames,
            annotated_frames=annotated,
            queries=[ClipQuery(None, masklets, is_exhaustive=False)],
            frame_indices=chosen,
            fps=FPS,
        )
        if not self.pixels:
            return sample
        source = record.get("mp4")
        source = local_path(source) if isinstance(source, str) else read_part(record, "mp4")
        sample = self.add_frames(sample, source)
        found = (sample.video.height, sample.video.width)
        if found != size:
            raise ValueError(f"{sample.video} has {found} pixels (height, width), not {size}.")
        return sample


def read_masklets(
    content: dict[str, Any], kind: str, size: tuple[int, int], wanted: list[int]
) -> list[Masklet]:
    """Masklets of one JSON file, in the frames that are wanted and where they are seen.

    Numbers of the automatic ones repeat those of the manual ones, so they get a letter.
    """
    entries = content["masklet"]
    masklets = []
    for position, number in enumerate(content["masklet_id"]):
        masks = ((frame, entries[frame // FRAMES_PER_ANNOTATION][position]) for frame in wanted)
        rles = seen_masks(masks, size)
        details = {name: content[name][position] for name in DETAILS if content.get(name)}
        source_id = number if kind == "manual" else f"a{number}"
        masklets.append(Masklet(rles, source_id, details))
    return masklets


class SavFolders(ClipReader):
    """Videos of SA-V as it is for validation and test.

    Args:
        folder: With `JPEGImages_24fps`, `Annotations_6fps` and `sav_{split}.txt`.
        split: "val" or "test".
        cut, pixels: As for `ClipReader`.
    """

    source = "sav"

    def __init__(
        self, folder: str, split: str = "val", cut: Cut | None = None, pixels: bool = True
    ):
        super().__init__(cut, pixels)
        self.folder, self.split = str(folder), split

    def __str__(self) -> str:
        return self.folder

    def records(self) -> Iterator[tuple[str, Record]]:
        for name in read_bytes(join(self.folder, f"sav_{self.split}.txt")).decode().split():
            yield name, {"video": name}

    def read(self, record: Record) -> ClipSample:
        name = record["video"]
        frames_folder = join(self.folder, "JPEGImages_24fps", name)
        frames = sorted(list_names(frames_folder, "*.jpg"), key=natural_order)
        masks_folder = join(self.folder, "Annotations_6fps", name)
        paths = {}
        for number in list_names(masks_folder):
            folder = join(masks_folder, number)
            paths[number] = positions_of(list_names(folder, "*.png"), frames, folder)
        annotated = sorted({frame for each in paths.values() for frame in each})
        chosen = self.choose_frames(name, len(frames), annotated)
        wanted = set(annotated if chosen is None else chosen)
        masklets, size = [], None
        for number, of_object in paths.items():
            masks = {
                frame: read_labels(of_object[frame]) > 0
                for frame in sorted(wanted & set(of_object))
            }
            size = size or next((mask.shape for mask in masks.values()), None)
            masklets.append(Masklet(seen_masks(masks.items(), size or (0, 0)), number))
        if size is None:
            raise ValueError(f"{masks_folder} has no masks.")
        sample = ClipSample(
            source=self.source,
            source_id=name,
            size=size,
            num_frames=len(frames),
            annotated_frames=annotated,
            queries=[ClipQuery(None, masklets, is_exhaustive=False)],
            frame_indices=chosen,
            frame_names=[Path(frame).stem for frame in frames],
            fps=FPS,
        )
        return self.add_frames(sample, [join(frames_folder, frame) for frame in frames])


def write_sav_videos(
    clips: Iterable[ClipSample],
    folder: str | Path,
    kind: str = "manual",
    per_tar: int | None = None,
) -> None:
    """Write clips, annotated at every fourth frame, as SA-V has them for training.

    Args:
        clips: With video.
        folder: To write to.
        kind: "manual" or "auto".
        per_tar: Videos in each of the tars; None writes single files.
    """
    av = import_av()
    folder, written = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    for clip in clips:
        check_annotated(clip)
        height, width = clip.size
        empty = to_rle(np.zeros(clip.size, dtype=bool), clip.size)
        content: dict[str, Any] = {
            "video_id": str(clip.source_id),
            "video_duration": clip.num_frames / FPS,
            "video_frame_count": float(clip.num_frames),
            "video_height": height,
            "video_width": width,
            "masklet": [
                [masklet.rles.get(frame, empty) for masklet in clip.masklets]
                for frame in clip.annotated_frames
            ],
            "masklet_id": [
                int(str(masklet.source_id).removeprefix("a")) for masklet in clip.masklets
            ],
            "masklet_num": len(clip.masklets),
        }
        for name in DETAILS:
            if clip.masklets and all(name in masklet.details for masklet in clip.masklets):
                content[name] = [masklet.details[name] for masklet in clip.masklets]
        paths = [folder / f"{clip.source_id}.mp4", folder / f"{clip.source_id}_{kind}.json"]
        written.append(paths)
        write_json(paths[1], content)
        with av.open(str(paths[0]), "w") as container:
            stream = container.add_stream("libx264", rate=int(FPS))
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            for frame in clip.video or ():
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame.pixels)))
            container.mux(stream.encode())
    if per_tar is not None:
        pack_tars(written, str(folder / "sav_{:03d}.tar"), per_tar, inside="sav_train")


def write_sav_folders(clips: Iterable[ClipSample], folder: str | Path, split: str = "val") -> None:
    """Write clips, annotated at every fourth frame, as SA-V has them for validation.

    Args:
        clips: With video.
        folder: To write to.
        split: "val" or "test".
    """
    folder, names = Path(folder), []
    for clip in clips:
        check_annotated(clip)
        name = str(clip.source_id)
        names.append(name)
        for frame in clip.video or ():
            write_image(folder / "JPEGImages_24fps" / name / f"{frame.index:05d}.jpg", frame.pixels)
        for position, masklet in enumerate(clip.masklets):
            masks = folder / "Annotations_6fps" / name / f"{position:03d}"
            masks.mkdir(parents=True, exist_ok=True)
            for frame in clip.annotated_frames:
                rle = masklet.rles.get(frame)
                mask = np.zeros(clip.size, dtype=bool) if rle is None else decode_rle(rle)
                Image.fromarray(mask).save(masks / f"{frame:05d}.png")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"sav_{split}.txt").write_text("".join(f"{name}\n" for name in names))


def check_annotated(clip: ClipSample) -> None:
    """Raise for clips that SA-V's form cannot say."""
    expected = list(range(0, clip.num_frames, FRAMES_PER_ANNOTATION))
    if clip.annotated_frames != expected[: len(clip.annotated_frames)]:
        raise ValueError(
            f"Clip {clip.source_id} is annotated in frames {clip.annotated_frames[:4]}..., SA-V in "
            f"every {FRAMES_PER_ANNOTATION}th from the first on."
        )
