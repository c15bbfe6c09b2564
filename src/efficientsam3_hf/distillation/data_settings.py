"""The section `data` of a configuration: which dataset, how much of it, and what is done to it."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from torch.utils.data import Dataset

from ..data.augmentations import Augmentations
from ..data.clips import Cut
from ..data.coco import CocoImages, LvisImages, RoboflowImages
from ..data.loading import Reader, load
from ..data.own_folder import OwnImages, OwnVideos
from ..data.phrases import PhraseList, RecapCaptions
from ..data.refcoco import RefCoco
from ..data.sa1b import Sa1b
from ..data.saco import SacoImages
from ..data.saco_video import SacoVideos
from ..data.sav import SavFolders, SavVideos
from ..data.synthetic import Clips, Scenes
from ..data.video_folders import Davis2017, Lvos, Mose, YoutubeVos
from .arguments import check_known, option


@dataclass
class DataSettings:
    """What is learned from, and what is evaluated on.

    Each `eval_` setting stands in for the one of its name where the student is evaluated; if there
    is none, it is not evaluated.
    """

    format: str = option("folder", "Layout of the dataset: a reader of docs/data.md.")
    root: str = option("", "Its folder, file or address.")
    split: str = option("train", "Its part, where the format has parts.")
    annotations: str | None = option(None, "File of annotations, where the format needs it named.")
    images: str | None = option(None, "Folder of pictures or frames, if it is not the usual one.")
    name: str | None = option(None, "What records call it; by default its format.")
    upright: bool = option(
        False, "saco: its annotations are of photographs as the camera was held."
    )
    tars: str = option("*.tar", "Which of SA-1B's tars, as a pattern.")
    masklets: Literal["manual", "auto", "both"] = option("manual", "Which of SA-V's.")
    captions: str | None = option(
        None, "SA-1B: which caption to ask for, such as label_5. Texts: the column of the captions."
    )
    side: int = option(224, "Pixels of a side of synthetic pictures.")
    length: int = option(1000, "How many synthetic samples there are.")

    fraction: float | None = option(None, "Share of the records, chosen by their names.")
    subset_seed: int = option(0, "Another one chooses another share.")
    limit: int | None = option(None, "Take only so many, the first ones.")
    streaming: bool = option(False, "Read files from beginning to end, as far away ones must be.")
    on_error: Literal["skip", "raise"] = option("skip", "What to do with what cannot be used.")
    broken_list: str | None = option(None, "File for the list of what was skipped in training.")
    least_side: int | None = option(None, "Pictures may be decoded smaller, down to this side.")

    augment: Literal["none", "flip", "all"] = option(
        "all", "Changes to pictures. A cache of features allows flips alone."
    )
    scale: list[float] = field(
        default_factory=lambda: [0.7, 1.4],
        metadata={"help": "Least and greatest factor of sizes."},
    )
    colour: float = option(0.2, "Most that brightness, contrast and saturation change.")
    positives: int = option(2, "Most phrases of an image that name something.")
    negatives: int = option(2, "Most phrases of an image that name nothing.")
    clip_length: int = option(8, "Frames of a clip: in a cut of a video, or in a synthetic one.")
    clip_step: int = option(1, "2 takes every second frame, and so on.")
    clip_place: Literal["random", "start"] = option(
        "random", "Where a cut begins: at another place in each epoch, or as in a cache."
    )

    eval_format: str | None = option(None, "Evaluation: its format.")
    eval_root: str | None = option(None, "Evaluation: its folder, file or address.")
    eval_split: str | None = option(None, "Evaluation: its part.")
    eval_tars: str | None = option(None, "Evaluation: which of SA-1B's tars.")
    eval_annotations: str | None = option(None, "Evaluation: its file of annotations.")
    eval_images: str | None = option(None, "Evaluation: its folder of pictures or frames.")
    eval_length: int | None = option(None, "Evaluation: how many synthetic samples there are.")
    eval_limit: int | None = option(None, "Evaluation: take only so many.")

    def __post_init__(self):
        if len(self.scale) != 2:
            raise ValueError(f"scale={self.scale} must be two numbers, the least and the greatest.")
        if self.streaming and self.limit:
            raise ValueError("limit needs records by number: with streaming, choose a fraction.")

    def check_format(self, kind: str) -> None:
        """Raise if samples of a kind, a key of `FORMATS`, do not come in this format."""
        for each in (self, self.for_evaluation()):
            if each is not None:
                check_known(each.format, list(FORMATS[kind]), f"format of {kind}")

    def for_evaluation(self) -> "DataSettings | None":
        """The settings of the dataset to evaluate on, if there is one."""
        named = {each.name: getattr(self, each.name) for each in fields(self)}
        own = {
            name.removeprefix("eval_"): value
            for name, value in named.items()
            if name.startswith("eval_") and value is not None
        }
        if not own:
            return None
        if "format" in own:  # what belongs to the other format
            own = {"annotations": None, "images": None, **own}
        whole = {"fraction": None, "limit": None, "streaming": False, "augment": "none"}
        whole |= {"broken_list": None}  # which is of what is learned from
        return replace(self, **{**whole, **own})

    def augmentations(self, seed: int) -> list[Augmentations]:
        """What is done to samples before they become batches."""
        if self.augment == "none":
            return []
        if self.augment == "flip":
            return [Augmentations(scale=(1, 1), colour=0, seed=seed)]
        low, high = self.scale
        return [Augmentations(scale=(low, high), colour=self.colour, seed=seed)]

    @property
    def cut(self) -> Cut:
        """Which frames to take of a video."""
        return Cut(self.clip_length, self.clip_step, self.clip_place)

    @property
    def least_size(self) -> tuple[int, int] | None:
        """As readers take it."""
        return None if self.least_side is None else (self.least_side, self.least_side)


def coco_images(reader: type[CocoImages], data: DataSettings) -> CocoImages:
    """COCO's files, or others in their form."""
    return reader(
        data.root,
        data.split,
        annotations=data.annotations,
        images=data.images,
        negatives="all",  # `ChooseQueries` takes some of them, others in each epoch
        least_size=data.least_size,
    )


def sa1b_images(data: DataSettings, annotations: bool = True) -> Sa1b:
    """SA-1B, whose masks take most of the time to read."""
    captions = data.captions if annotations else None
    return Sa1b(data.root, data.tars, annotations, captions, least_size=data.least_size)


def needed(data: DataSettings, name: str) -> str:
    """A setting that a format cannot do without."""
    value = getattr(data, name)
    if value is None:
        raise ValueError(f"Data of format {data.format!r} need {name}.")
    return value


Build = Callable[[DataSettings], Reader | Dataset]

IMAGES: dict[str, Build] = {
    "coco": lambda data: coco_images(CocoImages, data),
    "lvis": lambda data: coco_images(LvisImages, data),
    "roboflow": lambda data: coco_images(RoboflowImages, data),
    "sa1b": sa1b_images,
    "saco": lambda data: SacoImages(
        needed(data, "annotations"),
        data.root,
        least_size=data.least_size,
        upright=data.upright,
    ),
    "refcoco": lambda data: RefCoco(data.root, data.split, least_size=data.least_size),
    "folder": lambda data: OwnImages(data.root, least_size=data.least_size),
    "synthetic": lambda data: Scenes(
        data.length,
        data.split,
        side=data.side,
        positives=data.positives,
        negatives=data.negatives,
    ),
}
CLIPS: dict[str, Build] = {
    "sav": lambda data: SavVideos(data.root, data.masklets, cut=data.cut),
    "sav_folders": lambda data: SavFolders(data.root, data.split, cut=data.cut),
    "davis": lambda data: Davis2017(data.root, data.split, cut=data.cut),
    "mose": lambda data: Mose(data.root, data.split, cut=data.cut),
    "lvos": lambda data: Lvos(data.root, data.split, cut=data.cut),
    "youtube_vos": lambda data: YoutubeVos(data.root, data.split, cut=data.cut),
    "saco_video": lambda data: SacoVideos(needed(data, "annotations"), data.root, cut=data.cut),
    "folder": lambda data: OwnVideos(data.root, cut=data.cut),
    "synthetic": lambda data: Clips(
        data.length, data.split, side=data.side, num_frames=data.clip_length
    ),
}
TEXTS: dict[str, Build] = {
    "phrases": lambda data: PhraseList(data.root),
    "captions": lambda data: RecapCaptions(data.root, column=data.captions),
}
# What samples are -> format -> how to read them.
FORMATS: dict[str, dict[str, Build]] = {
    "pictures": {**IMAGES, "sa1b": lambda data: sa1b_images(data, annotations=False)},
    "images": IMAGES,
    "clips": CLIPS,
    "texts": TEXTS,
}


def load_samples(data: DataSettings, kind: str, seed: int = 0) -> Any:
    """The samples of a dataset.

    Args:
        data: Which.
        kind: What samples are: a key of `FORMATS`. "pictures" are images without annotations.
        seed: Of the order of a stream.
    """
    data.check_format(kind)
    source = FORMATS[kind][data.format](data)
    if not isinstance(source, Reader):
        return source
    samples = load(
        source,
        streaming=data.streaming,
        on_error=data.on_error,
        fraction=data.fraction,
        subset_seed=data.subset_seed,
        broken_list=data.broken_list,
    )
    if data.streaming:
        samples = samples.shuffle(seed)
    elif data.limit is not None:
        samples = samples.select(range(min(data.limit, len(samples))))
    if data.name is not None:
        samples.name = data.name
    return samples
