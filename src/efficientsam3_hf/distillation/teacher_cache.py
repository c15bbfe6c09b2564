"""The teacher's features on disk, read by the names of pictures.

cache = TeacherCache.open("cache", teacher=teacher, transform=processor)
stored = cache.read(["coco/139", "coco/285"], pixel_values)  # as bytes, in a worker
features = cache.decode(stored, dtype=torch.bfloat16)  # on the device
"""

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from ..data.clips import ClipReader
from ..data.loading import Samples
from .cache_files import (
    CODEC,
    INDEX,
    THUMBNAIL_TOLERANCE,
    CacheError,
    Manifest,
    checksum,
    refuse_differences,
    shard_path,
    thumbnails,
    transform_settings,
)
from .codecs import Codec, load_codec
from .teacher import Teacher

# Of each part, what its codec stores; then the small copies of the pictures.
StoredFeatures = dict[str, dict[str, Tensor]]

# Shards that a process keeps open: an open one takes addresses, not memory.
MOST_OPEN = 256


class TeacherCache:
    """A finished cache. Worker processes may share one; all of them verify each shard once.

    Args:
        folder: Of the cache.
        manifest: What is in it.
        codecs: Of each part.
        index: What `index.json` holds.
    """

    def __init__(
        self, folder: Path, manifest: Manifest, codecs: dict[str, Codec], index: dict[str, Any]
    ):
        self.folder, self.manifest, self.codecs = folder, manifest, codecs
        self.errors: dict[str, dict[str, float]] = index["errors"]
        self.shards: list[dict[str, Any]] = index["shards"]
        # Name -> (shard, row) of the picture and, where there is one, of the flipped one.
        self.places: dict[str, list[tuple[int, int]]] = {}
        for shard in self.shards:
            for row, key in enumerate(shard.pop("pictures")):
                self.places.setdefault(key, []).append((shard["number"], row))
        self.by_number = {shard["number"]: shard for shard in self.shards}
        self.verified = torch.zeros(manifest.num_shards, dtype=torch.bool).share_memory_()
        self.opened: OrderedDict[int, Any] = OrderedDict()

    @classmethod
    def open(
        cls,
        folder: str | os.PathLike,
        teacher: Teacher | None = None,
        transform: Any = None,
        dataset: Samples | None = None,
    ) -> "TeacherCache":
        """A cache, if it is finished and was made as is expected.

        Args:
            folder: Of the cache.
            teacher: Whose features these must be; None for whose they are.
            transform: Processor or image processor that must have made the pixels. None leaves it
                to the comparison of pictures when features are read.
            dataset: Samples that must be those that were cached, in their order; None for any. A
                name that is not there is an error in any case.
        """
        folder = Path(folder)
        manifest = Manifest.load(folder)
        wanted: dict[str, Any] = {}
        if teacher is not None:
            fingerprint = teacher.fingerprint(manifest.kind)
            wanted["teacher"] = {**manifest.teacher, "fingerprint": fingerprint}
        if transform is not None:
            wanted["transform"] = transform_settings(transform)
        if dataset is not None:
            wanted["dataset"] = dataset_settings(dataset)
        what_to_do = "Train with what it was made with, or write another cache."
        refuse_differences(folder, manifest, wanted, what_to_do)
        if not (folder / INDEX).is_file():
            done = len(list((folder / "shards").glob("*.json")))
            raise CacheError(
                f"The cache in {folder} is not finished: {done} of {manifest.num_shards} shards "
                "are there. Run the command that writes it again; it goes on where it stopped."
            )
        index = json.loads((folder / INDEX).read_text())
        for shard in index["shards"]:
            check_size(folder, shard)
        return cls(folder, manifest, load_codecs(folder, manifest), index)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "opened": OrderedDict()}

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, key: str) -> bool:
        return key in self.places

    def __iter__(self) -> Iterator[str]:
        """Names in the order in which they lie on disk, flipped ones left out."""
        return iter(self.places)

    def read(self, keys: Sequence[str], pixel_values: Tensor | None = None) -> StoredFeatures:
        """What is stored of some pictures.

        Args:
            keys: Names of the pictures, as `picture_keys` gives them.
            pixel_values: (pictures, 3, height, width) as the student sees them. They are compared
                with what the teacher saw, and tell which of them are flipped. None takes each
                picture as it is, unseen.
        """
        small = None if pixel_values is None else thumbnails(pixel_values)
        rows = []
        for number, key in enumerate(keys):
            shard, row = self.place_of(key, None if small is None else small[number])
            handle = self.open_shard(shard)
            names = [name for name in handle.keys() if name != "thumbnails"]  # noqa: SIM118
            rows.append({name: handle.get_slice(name)[row : row + 1] for name in names})
        stored: StoredFeatures = {part: {} for part in self.codecs}
        for name in rows[0]:
            part, field = name.split(".")
            stored[part][field] = torch.cat([row[name] for row in rows])
        return stored

    def decode(
        self, stored: Mapping[str, Mapping[str, Tensor]], dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Tokens (pictures, tokens, channels) of each part, on the device of what was stored."""
        return {part: self.codecs[part].decode(tensors, dtype) for part, tensors in stored.items()}

    def place_of(self, key: str, small: Tensor | None) -> tuple[int, int]:
        """Shard and row of a picture, of the flipped one if that is what was seen."""
        if key not in self.places:
            some = ", ".join(list(self.places)[:3])
            raise CacheError(
                f"{key} is not among the {len(self)} pictures of the cache in {self.folder} "
                f"({some}, ...). Train on the samples that were cached, of videos on the same cuts "
                '(Cut(place="start")), or cache these.'
            )
        places = self.places[key]
        if small is None:
            return places[0]
        seen = [self.open_shard(shard).get_slice("thumbnails")[row] for shard, row in places]
        distances = [float((each.float() - small.float()).abs().max()) for each in seen]
        nearest = min(range(len(places)), key=distances.__getitem__)
        if not distances[nearest] <= THUMBNAIL_TOLERANCE:
            allowed = "a flip" if self.manifest.flips else "no change, as no flips are cached"
            raise CacheError(
                f"The picture of {key} is not the one that the teacher saw: small copies of them "
                f"differ by {distances[nearest]:.2f}, where {THUMBNAIL_TOLERANCE} is rounding. "
                f"With this cache dataset, transform and augmentation ({allowed}) must be those of "
                "the cache."
            )
        return places[nearest]

    def open_shard(self, number: int) -> Any:
        """A shard to read from; its checksum is verified when a process is the first to open it."""
        if number in self.opened:
            self.opened.move_to_end(number)
            return self.opened[number]
        path = shard_path(self.folder, number)
        if not self.verified[number]:
            check_size(self.folder, self.by_number[number])
            if checksum(path) != self.by_number[number]["checksum"]:
                raise damaged(path, "its checksum is not the one that the index has")
            self.verified[number] = True
        try:
            self.opened[number] = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise damaged(path, str(error)) from error
        if len(self.opened) > MOST_OPEN:
            self.opened.popitem(last=False)
        return self.opened[number]

    def verify(self) -> None:
        """Read all shards, and raise for the first that is damaged."""
        self.verified.zero_()
        self.opened.clear()
        for number in self.by_number:
            self.open_shard(number)


def dataset_settings(samples: Samples) -> dict[str, Any]:
    """By what a dataset and its order are known: names of its records, cuts of its videos."""
    names = samples.names
    digest = hashlib.blake2b(json.dumps(names).encode(), digest_size=16).hexdigest()
    cut = samples.reader.cut if isinstance(samples.reader, ClipReader) else None
    return {
        "fingerprint": digest,
        "count": len(names),
        "source": type(samples.reader).__name__,
        "cut": None if cut is None else asdict(cut),
    }


def load_codecs(folder: Path, manifest: Manifest) -> dict[str, Codec]:
    """The codec of each part."""
    tensors = {}
    if manifest.codec_checksum is not None:
        path = folder / CODEC
        if not path.is_file() or checksum(path) != manifest.codec_checksum:
            raise CacheError(
                f"{path} is missing or damaged, and no shard can be decoded without it. Delete the "
                "folder and write the cache again."
            )
        tensors = load_file(path)
    codecs = {}
    for part in manifest.parts:
        own = {
            name.removeprefix(f"{part}."): tensor
            for name, tensor in tensors.items()
            if name.startswith(f"{part}.")
        }
        codecs[part] = load_codec(manifest.codec["name"], own)
    return codecs


def check_size(folder: Path, shard: Mapping[str, Any]) -> None:
    """Raise if a shard is missing, or is not as long as it was."""
    path = shard_path(folder, shard["number"])
    if not path.is_file():
        raise damaged(path, "it is missing")
    if (found := path.stat().st_size) != shard["bytes"]:
        raise damaged(path, f"it has {found:,} bytes instead of {shard['bytes']:,}")


def damaged(path: Path, how: str) -> CacheError:
    """The error for a shard that cannot be used."""
    return CacheError(
        f"Shard {path} is damaged: {how}. Delete it and run the command that wrote the cache "
        "again: only what is missing is computed anew."
    )
