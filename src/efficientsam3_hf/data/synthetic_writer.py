"""The synthetic world on disk, in the form of a known dataset.

reader = write_synthetic("scenes", "coco", split="val", count=100)
load(reader)[0]
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .coco import CocoImages, LvisImages, RoboflowImages, write_coco
from .loading import Reader
from .sa1b import Sa1b, write_sa1b
from .saco import SacoImages, write_saco
from .saco_video import SacoVideos, write_saco_videos
from .sav import SavFolders, SavVideos, write_sav_folders, write_sav_videos
from .synthetic import Clips, Scenes, check_choice
from .video_folders import FORMS as FOLDER_FORMS
from .video_folders import write_video_folders

IMAGE_FORMS = ("sa1b", "sa1b_tars", "coco", "lvis", "roboflow", "saco")
VIDEO_FORMS = ("sav_videos", "sav_tars", "sav_folders", "saco_video", *FOLDER_FORMS)

PER_TAR = 1000

# What each form asks of a scene or clip; "anything" where masks have no names.
QUESTIONS = {
    "coco": "shapes",
    "lvis": "shapes",
    "roboflow": "shapes",
    "saco": "phrases",
    "saco_video": "phrases",
}


def write_synthetic(
    folder: str | Path,
    form: str,
    split: str = "train",
    count: int = 100,
    seed: int = 0,
    side: int = 224,
    num_frames: int = 16,
    **options: Any,
) -> Reader:
    """Write scenes or clips, and return the reader for them.

    Args:
        folder: To write to.
        form: One of `IMAGE_FORMS` or `VIDEO_FORMS`.
        split: "train", "val" or "test". It names the files too, where a form lets it.
        count: Images or clips.
        seed: Another one makes another world of the same kind.
        side: Height and width in pixels.
        num_frames: Of each clip.
        options: Others of `Scenes` or `Clips`, such as `world`.
    """
    check_choice("form", form, (*IMAGE_FORMS, *VIDEO_FORMS))
    check_choice("split", split, ("train", "val", "test"))
    options |= {"split": split, "seed": seed, "side": side}
    options["ask"] = QUESTIONS.get(form, "anything")
    numbers = tqdm(range(count), f"{split}, {form}", leave=False, disable=None)
    if form in IMAGE_FORMS:
        scenes = Scenes(count, **options)
        return write_images(Path(folder), form, split, (scenes[number] for number in numbers))
    every = 4 if form.startswith("sav_") else 1
    clips = Clips(count, num_frames=num_frames, annotate_every=every, **options)
    return write_videos(Path(folder), form, split, (clips[number] for number in numbers))


def write_images(folder: Path, form: str, split: str, scenes: Iterator) -> Reader:
    """Write scenes, and return the reader for them."""
    if form in ("sa1b", "sa1b_tars"):
        write_sa1b(scenes, folder, PER_TAR if form == "sa1b_tars" else None)
        return Sa1b(str(folder))
    if form == "saco":
        annotations = folder / f"gold_synthetic_merged_a_release_{split}.json"
        write_saco(scenes, annotations, folder / "images")
        return SacoImages(str(annotations), str(folder / "images"))
    if form == "coco":
        split = f"{split}2017"
    write_coco(scenes, folder, split, form)
    readers = {"coco": CocoImages, "lvis": LvisImages, "roboflow": RoboflowImages}
    return readers[form](str(folder), split, negatives="all")


def write_videos(folder: Path, form: str, split: str, clips: Iterator) -> Reader:
    """Write clips, and return the reader for them."""
    if form in ("sav_videos", "sav_tars"):
        write_sav_videos(clips, folder, per_tar=PER_TAR if form == "sav_tars" else None)
        return SavVideos(str(folder))
    if form == "sav_folders":
        write_sav_folders(clips, folder, split)
        return SavFolders(str(folder), split)
    if form == "saco_video":
        annotations = folder / "annotation" / f"saco_veval_synthetic_{split}.json"
        frames = folder / "saco_synthetic" / "JPEGImages_24fps"
        write_saco_videos(clips, annotations, frames)
        return SacoVideos(str(annotations), str(frames))
    write_video_folders(clips, folder, form, split)
    return FOLDER_FORMS[form](str(folder), split)
