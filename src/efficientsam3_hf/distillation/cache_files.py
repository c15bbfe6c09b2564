"""What a cache consists of on disk, and how its files get there whole or not at all.

manifest.json            what was cached, of which teacher, transform and dataset
codec.safetensors        the basis, where the codec has one
shards/00000.safetensors encoded features of some pictures, in the order of the dataset
shards/00000.json        which these are, checksum, error of the codec; written after the shard
index.json               all of these in one, written at the end
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from torch import Tensor
from torch.nn import functional as F

from ..data.samples import ClipSample, ImageSample

MANIFEST, INDEX, CODEC = "manifest.json", "index.json", "codec.safetensors"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

# What of an image processor decides which pixels a model sees.
TRANSFORM_FIELDS = (
    "do_resize", "size", "resample", "do_center_crop", "crop_size", "do_rescale", "rescale_factor",
    "do_normalize", "image_mean", "image_std", "do_pad", "pad_size",
)  # fmt: skip

# Side of the small picture that is kept of each, and how far another may be from it, in units of
# the model's input. Decoding at half size stays below, another crop or mean does not.
THUMBNAIL_SIDE = 16
THUMBNAIL_TOLERANCE = 0.05


class CacheError(ValueError):
    """A cache that cannot be used, and what to do about it."""


class DiskFullError(OSError):
    """There is no room for the next shard; all that was written before is safe."""


@dataclass
class Manifest:
    """What is in a cache.

    Args:
        kind: Of the features.
        codec: Its name, and the rank or energy that were asked for.
        flips: Whether each picture is there flipped left to right, too.
        parts: Tokens and channels of each part of the features.
        samples_per_shard: Consecutive samples of the dataset that share a shard.
        teacher: `fingerprint`, `dtype`, `image_size`.
        transform: Settings of the image processor.
        dataset: `fingerprint` of the names in their order, `count` of samples, `source`.
        versions: Of the packages that wrote it.
        teacher_name: Where the teacher came from.
        codec_checksum: Of the codec's own file, where it has one.
    """

    kind: str
    codec: dict[str, Any]
    flips: bool
    parts: dict[str, list[int]]
    samples_per_shard: int
    teacher: dict[str, Any]
    transform: dict[str, Any]
    dataset: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)
    teacher_name: str = ""
    codec_checksum: str | None = None

    @property
    def num_shards(self) -> int:
        return -(-self.dataset["count"] // self.samples_per_shard)

    def save(self, folder: Path) -> None:
        write_json(folder / MANIFEST, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """That of a cache, or an error that says what is wrong with it."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CacheError(
                f"{folder} holds no teacher cache: there is no {MANIFEST}. Write one with "
                "efficientsam3 cache-teacher."
            )
        try:
            return cls(**json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise CacheError(
                f"{path} is damaged ({error}). It cannot be made anew without the shards: delete "
                "the folder and write the cache again."
            ) from error


def refuse_differences(
    folder: Path, manifest: Manifest, wanted: Mapping[str, Any], what_to_do: str
) -> None:
    """Raise if a cache was made otherwise, and name all that differs.

    Args:
        folder: Of the cache.
        manifest: Of the cache.
        wanted: Values of some fields of the manifest.
        what_to_do: The end of the message.
    """
    lines = []
    for name, value in wanted.items():
        found = getattr(manifest, name)
        if isinstance(value, dict) and isinstance(found, dict):
            for key in sorted({*value, *found}):
                if value.get(key) != found.get(key):
                    lines.append(f"{name} {key}: {found.get(key)} there, {value.get(key)} here")
        elif value != found:
            lines.append(f"{name}: {found} there, {value} here")
    if lines:
        differing = [name for name in wanted if any(line.startswith(name) for line in lines)]
        raise CacheError(
            f"The cache in {folder} was made with another {', another '.join(differing)} "
            f"({'; '.join(lines)}). {what_to_do}"
        )


def transform_settings(image_processor: Any) -> dict[str, Any]:
    """What an image processor, or a processor with one, does to pictures, as JSON has it."""
    image_processor = getattr(image_processor, "image_processor", image_processor)
    settings = image_processor.to_dict()
    chosen = {name: settings[name] for name in TRANSFORM_FIELDS if settings.get(name) is not None}
    return json.loads(json.dumps(chosen, default=dict))


def shard_path(folder: Path, number: int, ending: str = ".safetensors") -> Path:
    """Where a shard, or what is said of it, lies."""
    return folder / "shards" / f"{number:05d}{ending}"


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that after any end of the process it is there whole, or not at all."""
    temporary = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno not in FULL:
            raise
        free = shutil.disk_usage(path.parent).free
        raise DiskFullError(
            error.errno,
            f"There is no room for {len(data):,} bytes of {path} ({error.strerror}; {free:,} bytes "
            "are free). All that was written before is safe: make room and run the same command "
            "again, which goes on from there",
        ) from error


def write_json(path: Path, content: Any) -> None:
    """Save JSON whole or not at all."""
    write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def sync_folder(folder: Path) -> None:
    """Let a rename outlast a loss of power, where folders can be synced."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def picture_keys(sample: ImageSample | ClipSample) -> list[str]:
    """Names under which the picture of a sample, or each frame of a cut, is cached.

    >>> picture_keys(ImageSample("coco", 139, "139.jpg", (480, 640)))
    ['coco/139']
    """
    name = f"{sample.source}/{sample.source_id}"
    if isinstance(sample, ImageSample):
        return [name]
    if sample.frame_indices is None:
        raise ValueError(f"Clip {sample.source_id} has no frames: take a cut of it first.")
    return [f"{name}#{index}" for index in sample.frame_indices]


def thumbnails(pixel_values: Tensor) -> Tensor:
    """Small copies (pictures, 3, side, side) by which it is seen whether pictures are the same."""
    return F.adaptive_avg_pool2d(pixel_values.float(), THUMBNAIL_SIDE).half()


@contextmanager
def alone_in(folder: Path, refusal: Exception) -> Iterator[None]:
    """Keep other processes that ask for the same out of a folder.

    Args:
        folder: Made if it is not there.
        refusal: Raised if one is in it already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise refusal from error
    try:
        yield
    finally:
        lock.release()
