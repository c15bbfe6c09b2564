"""Files of a dataset, on disk or at any address that fsspec opens.

hf://datasets/NAME/REPOSITORY              on the Hub
tar://sav_val::/data/sav_val.tar           a folder in a tar or zip, as it is
zip://DAVIS::hf://datasets/.../DAVIS.zip   likewise, far away
"""

import fnmatch
import io
import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from huggingface_hub import HfFileSystem, hf_hub_download
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Bytes to fetch at once of a file that is read from beginning to end.
LARGE_PIECE = 1 << 25


def is_remote(path: str | os.PathLike) -> bool:
    """Whether this is an address and not a path."""
    return "://" in str(path)


def join(folder: str | os.PathLike, *names: str) -> str:
    """A path or address below a folder.

    >>> join("tar://sav_val::/data/sav_val.tar", "sav_val.txt")
    'tar://sav_val/sav_val.txt::/data/sav_val.tar'
    """
    if is_remote(folder):
        inner, *archive = str(folder).split("::", 1)
        return "::".join(["/".join([inner.rstrip("/"), *names]), *archive])
    return str(Path(folder, *names))


def find(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path in it."""
    if "::" not in address:
        return fsspec.core.url_to_fs(address)
    inner, archive = address.split("::", 1)
    kind, path = inner.split("://", 1)
    return open_archive(kind, archive, os.getpid()), path


@lru_cache(maxsize=4)
def open_archive(kind: str, archive: str, process: int) -> Any:
    """What is in a tar or zip, whose index is read once.

    Args:
        kind: "tar", "zip" or another of fsspec's.
        archive: Path or address.
        process: That reads it: a file that is open may not be shared with another.
    """
    filesystem, _ = fsspec.core.url_to_fs(f"{kind}://::{archive}")
    return filesystem


def open_file(path: str, from_end_to_end: bool = False) -> Any:
    """A file to read bytes from.

    Args:
        path: Path or address.
        from_end_to_end: Whether it will be read from beginning to end. Then it is fetched from an
            address in larger pieces, since each costs a round trip.
    """
    if is_remote(path):
        filesystem, inner = find(path)
        options = {"block_size": LARGE_PIECE} if from_end_to_end else {}
        return filesystem.open(inner, "rb", **options)
    return open(path, "rb")


def read_bytes(path: str, offset: int = 0, size: int | None = None) -> bytes:
    """A file, or `size` bytes of it from `offset` on."""
    with open_file(path) as file:
        if offset:
            file.seek(offset)
        data = file.read() if size is None else file.read(size)
    if size is not None and len(data) < size:
        raise EOFError(f"{path} ends {size - len(data)} bytes early.")
    return data


def read_json(path: str) -> Any:
    """What a JSON file holds."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON that can be read: {error}.") from error


def exists(path: str) -> bool:
    """Whether there is such a file or folder."""
    if is_remote(path):
        filesystem, inner = find(path)
        return filesystem.exists(inner)
    return os.path.exists(path)


def list_names(folder: str, pattern: str = "*") -> list[str]:
    """Names of the files and folders in a folder that fit a pattern, sorted."""
    if is_remote(folder):
        filesystem, inner = find(folder)
        names = [path.rstrip("/").rsplit("/", 1)[-1] for path in filesystem.ls(inner, detail=False)]
    else:
        names = [entry.name for entry in os.scandir(folder)]
    return sorted(fnmatch.filter(names, pattern))


def list_below(folder: str, pattern: str) -> list[str]:
    """Paths of the files in a folder and all below it whose names fit a pattern, sorted."""
    if is_remote(folder):
        if "::" in folder:
            raise ValueError(
                f"{folder} cannot be searched: only formats that say where each file is are read "
                "out of an archive. Extract it."
            )
        filesystem, inner = find(folder)
        found = [filesystem.unstrip_protocol(path) for path in filesystem.find(inner)]
        return sorted(path for path in found if fnmatch.fnmatch(path.rsplit("/", 1)[-1], pattern))
    found = []
    for parent, _, names in os.walk(folder, followlinks=True):
        found += [os.path.join(parent, name) for name in fnmatch.filter(names, pattern)]
    return sorted(found)


def local_path(path: str) -> str:
    """A path on disk for what is at an address.

    It is fetched once: from the Hub into its cache, from elsewhere for the life of the process.
    """
    if not is_remote(path):
        return path
    filesystem, inner = find(path)
    if isinstance(filesystem, HfFileSystem):
        place: Any = filesystem.resolve_path(inner)
        if getattr(place, "repo_id", None):  # what has none is a bucket
            return hf_hub_download(
                place.repo_id,
                place.path_in_repo,
                repo_type=place.repo_type,
                revision=place.revision,
                endpoint=filesystem.endpoint,
                token=filesystem.token,
            )
    return str(fsspec.open_local(f"simplecache::{path}"))


def opened_picture(source: str | bytes) -> Image.Image:
    """A picture that is not decoded yet, by path, address or the bytes of its file."""
    data, name = (read_bytes(source), source) if isinstance(source, str) else (source, "a picture")
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # which names an object in memory
        raise ValueError(f"{name}, of {len(data)} bytes, is in no form that is known") from error


def image_size(source: str | bytes, upright: bool = False) -> tuple[int, int]:
    """(height, width) of a picture, which is not decoded for it; arguments as for `read_image`."""
    with opened_picture(source) as picture:
        size = (picture.height, picture.width)
        return size[::-1] if upright and is_on_its_side(picture) else size


def is_on_its_side(picture: Image.Image) -> bool:
    """Whether a photograph has to be turned by a quarter to be upright."""
    return picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5


def read_image(
    source: str | bytes,
    size: tuple[int, int] | None = None,
    least_size: tuple[int, int] | None = None,
    upright: bool = False,
) -> np.ndarray:
    """Pixels (height, width, 3) of a picture, 8 bits each.

    Args:
        source: Path, address or the bytes of the file.
        size: (height, width) that it must have; where it is to be upright, then.
        least_size: A JPEG larger than twice this (height, width) is decoded at 1/2, 1/4 or 1/8 of
            its size, but never smaller than this, which saves most of the time.
        upright: Turn photographs as their EXIF data say. Annotations of the known datasets are of
            the pixels as stored.
    """
    with opened_picture(source) as picture:
        turned = upright and is_on_its_side(picture)
        found = (picture.height, picture.width)[:: -1 if turned else 1]
        if size is not None and found != tuple(size):
            raise ValueError(
                f"The picture has {found} pixels (height, width), its annotations {tuple(size)}."
            )
        if least_size is not None:
            height, width = least_size[::-1] if turned else least_size
            picture.draft("RGB", (width, height))
        if upright:
            picture = ImageOps.exif_transpose(picture)
        return to_rgb(picture)


def to_rgb(picture: Image.Image) -> np.ndarray:
    """Pixels (height, width, 3) of 8 bits; 16 are scaled, and what is transparent lies on white."""
    if picture.mode.startswith("I"):  # PIL itself would clip it to white
        grey = np.clip(np.array(picture).astype(np.int64), 0, 65535)
        return np.repeat((grey // 257).astype(np.uint8)[..., None], 3, axis=2)
    if "A" in picture.getbands() or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return np.array(picture.convert("RGB"))


def read_labels(path: str) -> np.ndarray:
    """Numbers of objects (height, width) out of a PNG with a palette, or a grey or binary one."""
    with opened_picture(path) as picture:
        if picture.mode not in ("P", "L", "1", "I;16", "I"):
            raise ValueError(f"{path} has mode {picture.mode}; object numbers need a palette.")
        return np.array(picture)


def write_image(path: str | os.PathLike, pixels: np.ndarray) -> None:
    """Save a picture, as JPEG of quality 95 or whatever else its name says."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, quality=95)


def write_json(path: str | os.PathLike, content: Any) -> None:
    """Save JSON."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
