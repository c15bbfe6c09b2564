"""What to evaluate on: a folder, the format it is in, and the parts that are scored apart.

subsets("/data/coco")                      COCO's val2017, by the files that are there
subsets("/data/sa-co-gold", task_formats)  one subset for each of Gold's, with its annotators
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.coco import CocoImages, LvisImages, RoboflowImages
from ..data.files import read_json
from ..data.loading import Reader, Samples
from ..data.loading import load as load_samples
from ..data.own_folder import OwnImages
from ..data.phrases import PhraseList
from ..data.sa1b import Sa1b
from ..data.saco import SacoImages
from ..data.saco_video import SacoVideos
from ..data.sav import SavFolders
from ..data.video_folders import Davis2017, Lvos, Mose, YoutubeVos

PICTURES = ("*.jpg", "*.jpeg", "*.png")


@dataclass
class Subset:
    """A part of a dataset that has numbers of its own.

    Args:
        dataset: Name for readers, such as "COCO".
        split: Part of it, such as "val2017".
        form: Name of the format.
        reader: Reads its records.
        truth: Annotation files, one for each annotator, for evaluators of whole files.
        name: Of the subset, where a dataset has several; else empty.
        samples: All that will be evaluated, in the order of the files.
        label: What to call the dataset in tables, if it is another one in the same form.
    """

    dataset: str
    split: str
    form: str
    reader: Reader
    truth: list[Path] = field(default_factory=list)
    name: str = ""
    samples: Any = None
    label: str = ""

    @property
    def shown(self) -> str:
        """Name of the dataset for readers."""
        return self.label or self.dataset

    @property
    def title(self) -> str:
        """Dataset and subset, for readers."""
        return f"{self.shown} {self.name}".strip()

    def open(self, limit: int | None) -> "Subset":
        """List the records, the first `limit` of them if there is a limit."""
        samples: Samples = load_samples(self.reader)
        if limit is not None and limit < len(samples):
            self.split = f"{self.split}, first {limit} of {len(samples)}"
            samples = samples.select(range(limit))
        self.samples = samples
        return self


def find_subsets(
    data: str | Path,
    formats: Sequence[str],
    form: str | None = None,
    split: str | None = None,
    images: str | Path | None = None,
) -> list[Subset]:
    """The subsets in a folder, by the files that are there.

    Args:
        data: Folder of the dataset, or file of phrases.
        formats: Those that will do.
        form: The one it is in; None looks.
        split: Part of it; None takes the one for validation, or the only one.
        images: Folder of the pictures, where they lie elsewhere.
    """
    data = Path(data)
    if not data.exists():
        raise FileNotFoundError(f"There is no {data}: --data is the folder of a dataset.")
    if form is not None and form not in formats:
        raise ValueError(f"--format {form} will not do here; {', '.join(formats)} will.")
    for name in [form] if form else formats:
        found = FINDERS[name](data, split, None if images is None else Path(images))
        if found:
            return found
    looked_for = "\n".join(f"  {name}: {LAYOUTS[name]}" for name in ([form] if form else formats))
    part = "" if split is None else f" with a split {split!r}"
    raise ValueError(f"{data} holds no dataset{part} of a form that will do:\n{looked_for}")


LAYOUTS = {
    "coco": "annotations/instances_SPLIT.json, pictures in images/SPLIT/ or SPLIT/",
    "lvis": "annotations/lvis_v1_SPLIT.json, pictures in train2017/, val2017/",
    "roboflow": "SPLIT/_annotations.coco.json beside its pictures",
    "saco": "gold_NAME_merged_a_release_SPLIT.json (b, c) or silver_NAME_merged_SPLIT.json",
    "sa1b": "sa_N.tar, or sa_N.jpg beside sa_N.json",
    "own": "pictures, and phrases.txt or phrases.json",
    "davis2017": "ImageSets/2017/SPLIT.txt, JPEGImages/480p/, Annotations/480p/",
    "mose": "meta_SPLIT.json, SPLIT/JPEGImages/, SPLIT/Annotations/",
    "mosev2": "as mose; only --format mosev2 tells one from the other",
    "lvos": "SPLIT_meta.json, SPLIT/JPEGImages/, SPLIT/Annotations/",
    "youtube-vos": "SPLIT/meta.json, SPLIT/JPEGImages/, SPLIT/Annotations/",
    "sa-v": "sav_SPLIT.txt, JPEGImages_24fps/, Annotations_6fps/",
    "saco-video": "annotation/saco_veval_NAME_SPLIT.json, saco_NAME/JPEGImages_24fps/",
    "phrases": "a file: a phrase in each line, or JSON",
}


def choose_split(
    found: dict[str, Path], wanted: str | None, preferred: Sequence[str], data: Path
) -> str | None:
    """The split that was asked for, the usual one, or the only one; None where there is none."""
    if wanted is not None:
        return wanted if wanted in found else None
    for name in preferred:
        if name in found:
            return name
    if len(found) > 1:
        raise ValueError(f"{data} has the splits {', '.join(sorted(found))}: choose by --split.")
    return next(iter(found), None)


def splits_of(data: Path, pattern: str, name: str) -> dict[str, Path]:
    """Split -> file, of the files that fit a pattern.

    Args:
        data: Folder.
        pattern: For `glob`.
        name: Regular expression whose only group is the split, over the path in the folder.
    """
    found = {}
    for path in sorted(data.glob(pattern)):
        if match := re.fullmatch(name, path.relative_to(data).as_posix()):
            found[match[1]] = path
    return found


def find_coco(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    found = splits_of(data, "annotations/instances_*.json", r"annotations/instances_(.+)\.json")
    chosen = choose_split(found, split, ["val2017", "test2017"], data)
    if chosen is None:
        return []
    # An absolute path stays what it is when it is joined to the folder.
    where = None if images is None else str(images.resolve())
    reader = CocoImages(str(data), chosen, images=where, negatives="all")
    return [Subset("COCO", chosen, "coco", reader, [found[chosen]])]


def find_lvis(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    found = splits_of(data, "annotations/lvis_v1_*.json", r"annotations/lvis_v1_(.+)\.json")
    chosen = choose_split(found, split, ["val", "test"], data)
    if chosen is None:
        return []
    where = None if images is None else str(images.resolve())
    return [
        Subset("LVIS", chosen, "lvis", LvisImages(str(data), chosen, images=where), [found[chosen]])
    ]


def find_roboflow(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    found = splits_of(data, "*/_annotations.coco.json", r"([^/]+)/_annotations\.coco\.json")
    chosen = choose_split(found, split, ["test", "valid", "val"], data)
    if chosen is None:
        return []
    reader = RoboflowImages(str(data), chosen, negatives="all")
    return [Subset(data.resolve().name, chosen, "roboflow", reader, [found[chosen]])]


GOLD = r"gold_(.+)_merged_([a-c])_release_(.+)\.json"
SILVER = r"silver_(.+)_merged_(.+)\.json"


def find_saco(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    of_subset: dict[tuple[str, str, str], dict[str, Path]] = defaultdict(dict)
    for path in [*sorted(data.glob("*.json")), *sorted(data.glob("*/*.json"))]:
        if match := re.fullmatch(GOLD, path.name):
            of_subset["SA-Co/Gold", match[3], match[1]][match[2]] = path
        elif match := re.fullmatch(SILVER, path.name):
            of_subset["SA-Co/Silver", match[2], match[1]]["a"] = path
    splits = {key[1]: data for key in of_subset}
    chosen = choose_split(splits, split, ["test", "val"], data)
    subsets = []
    for (dataset, of_split, name), annotators in of_subset.items():
        if of_split == chosen:
            files = [annotators[letter] for letter in sorted(annotators)]
            reader = SacoImages(str(files[0]), str(pictures_of(files[0], data, name, images)))
            subsets.append(Subset(dataset, of_split, "saco", reader, files, name))
    return subsets


def pictures_of(annotations: Path, data: Path, name: str, images: Path | None) -> Path:
    """The folder that file names of SA-Co start from."""
    first = read_json(str(annotations))["images"][0]["file_name"]
    family = "sa1b-images" if first.startswith("sa_") else "metaclip-images"
    places = [images] if images else []
    for base in [] if images else dict.fromkeys([data, annotations.parent]):
        places += [base / family, base / "images", base / name, base]
    for place in places:
        if (place / first).is_file():
            return place
    raise FileNotFoundError(
        f"The picture {first} of {annotations.name} is in none of "
        f"{', '.join(str(place) for place in places)}: say by --images where they are."
    )


def find_sa1b(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    if next(data.rglob("sa_*.tar"), None) is None and next(data.rglob("sa_*.json"), None) is None:
        return []
    return [Subset("SA-1B", split or "all", "sa1b", Sa1b(str(data)))]


def find_own(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    if not data.is_dir() or not any(next(data.rglob(each), None) for each in PICTURES):
        return []
    return [Subset(data.resolve().name, split or "all", "own", OwnImages(str(data)))]


def find_davis(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    found = splits_of(data, "ImageSets/2017/*.txt", r"ImageSets/2017/(.+)\.txt")
    chosen = choose_split(found, split, ["val"], data)
    if chosen is None:
        return []
    return [Subset("DAVIS 2017", chosen, "davis2017", Davis2017(str(data), chosen))]


def find_split_folders(
    form: str, title: str, reader: Callable[..., Reader], pattern: str, name: str
) -> Callable[[Path, str | None, Path | None], list[Subset]]:
    """The finder of a format whose splits have a file each that tells them."""

    def find(data: Path, split: str | None, images: Path | None) -> list[Subset]:
        found = splits_of(data, pattern, name)
        chosen = choose_split(found, split, ["valid", "val", "test"], data)
        if chosen is None:
            return []
        return [Subset(title, chosen, form, reader(str(data), chosen))]

    return find


def find_saco_video(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    of_split: dict[str, dict[str, Path]] = defaultdict(dict)
    pattern = r"saco_veval_(.+)_([^_]+)\.json"
    for path in [*sorted(data.glob("*.json")), *sorted(data.glob("annotation/*.json"))]:
        if match := re.fullmatch(pattern, path.name):
            of_split[match[2]][match[1]] = path
    splits = dict.fromkeys(of_split, data)
    chosen = choose_split(splits, split, ["val", "test"], data)
    subsets = []
    for name, path in of_split.get(chosen or "", {}).items():
        frames = frames_of(data, name, images)
        reader = SacoVideos(str(path), str(frames))
        subsets.append(Subset("SA-Co/VEval", chosen or "", "saco-video", reader, [path], name))
    return subsets


def frames_of(data: Path, name: str, images: Path | None) -> Path:
    """The folder that file names of VEval start from."""
    if images is not None:
        return images
    short = {"smartglasses": "sg"}.get(name, name)
    places = sorted(data.glob(f"saco_{short}/JPEGImages_*"))
    if not places:
        raise FileNotFoundError(
            f"{data} has no saco_{short}/JPEGImages_...: say by --images where the frames are."
        )
    return places[0]


def find_phrases(data: Path, split: str | None, images: Path | None) -> list[Subset]:
    path = data
    if data.is_dir():
        names = [name for name in ("phrases.txt", "phrases.json") if (data / name).is_file()]
        if not names:
            return []
        path = data / names[0]
    return [Subset(path.stem, split or "all", "phrases", PhraseList(str(path)), [path])]


FINDERS: dict[str, Callable[[Path, str | None, Path | None], list[Subset]]] = {
    "coco": find_coco,
    "lvis": find_lvis,
    "roboflow": find_roboflow,
    "saco": find_saco,
    "sa1b": find_sa1b,
    "own": find_own,
    "davis2017": find_davis,
    "mose": find_split_folders("mose", "MOSE", Mose, "meta_*.json", r"meta_(.+)\.json"),
    "mosev2": find_split_folders("mosev2", "MOSEv2", Mose, "meta_*.json", r"meta_(.+)\.json"),
    "lvos": find_split_folders("lvos", "LVOS", Lvos, "*_meta.json", r"(.+)_meta\.json"),
    "youtube-vos": find_split_folders(
        "youtube-vos", "YouTube-VOS", YoutubeVos, "*/meta.json", r"([^/]+)/meta\.json"
    ),
    "sa-v": find_split_folders("sa-v", "SA-V", SavFolders, "sav_*.txt", r"sav_(.+)\.txt"),
    "saco-video": find_saco_video,
    "phrases": find_phrases,
}
