"""Opens files of weights without running what they contain, and without reading them whole."""

import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".pt", ".pth", ".safetensors")
WRAPPERS = ("model", "state_dict")
TRANSFORMERS_INDEX = "model.safetensors.index.json"
TRANSFORMERS_WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class WeightFile:
    """Flat weights of one checkpoint.

    Args:
        paths: The files that hold them: one, or the shards of a transformers folder.
        weights: Keys to tensors, which stay on disk until they are used.
        wrapper: Key under which the file keeps its weights; None where they lie bare.
    """

    paths: tuple[Path, ...]
    weights: dict[str, Tensor]
    wrapper: str | None = None


def read_weights(path: Path) -> WeightFile:
    """Open a `.pt`, `.pth` or `.safetensors` file, or a folder that transformers wrote."""
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    if path.suffix == ".safetensors":
        return WeightFile((path,), _read_safetensors(path))
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name} is none of {', '.join(SUFFIXES)}: give a file of weights.")
    weights, wrapper = _unwrap(_read_torch(path), path)
    return WeightFile((path,), weights, wrapper)


def is_transformers_folder(path: Path) -> bool:
    """Whether transformers wrote this folder, as against one of released files."""
    names = (TRANSFORMERS_INDEX, TRANSFORMERS_WEIGHTS)
    return (path / "config.json").is_file() and any((path / name).is_file() for name in names)


def _read_folder(folder: Path) -> WeightFile:
    if not is_transformers_folder(folder):
        raise ValueError(
            f"{folder} holds no config.json with {TRANSFORMERS_WEIGHTS} beside it. Give a folder "
            f"that save_pretrained wrote, or a single file of weights."
        )
    index = folder / TRANSFORMERS_INDEX
    names = [TRANSFORMERS_WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    shards = tuple(folder / name for name in names)
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= _read_safetensors(shard)
    return WeightFile(shards, weights)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)  # views of the mapped file
    except (SafetensorError, FileNotFoundError) as error:
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: compare its "
            f"size with the original's, and fetch it again."
        ) from error


def _read_torch(path: Path) -> Any:
    """What torch saved, only tensors and plain containers being allowed in it."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    if is_archive and not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path} ends before its table of contents: it is truncated. Compare its size "
            f"({path.stat().st_size:,} bytes) with the original's, and fetch it again."
        )
    try:
        with warnings.catch_warnings():
            # whatever protocol a pickle has, it is read as far as it holds weights
            warnings.filterwarnings("ignore", "Detected pickle protocol")
            # torch maps archives only; what it wrote before version 1.6 is read whole
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights, or is no file of torch's ({_reason(error)}). "
            f"A pickle can run any program, so nothing of it was run. If you trust where it is "
            f"from, save its state dict alone with torch.save and convert that."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{path} cannot be read: {_reason(error)}. It may be damaged or truncated: fetch it "
            f"again."
        ) from error


def _reason(error: Exception) -> str:
    """What torch complains of, without its advice."""
    text = str(error).split("WeightsUnpickler error: ")[-1].strip()
    return text.splitlines()[0].rstrip(". ") if text else type(error).__name__


def _unwrap(content: Any, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The state dict in what a file holds, and the key it was found under."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, not a state dict.")
    found = [key for key in WRAPPERS if isinstance(content.get(key), Mapping)]
    if len(found) > 1:
        raise ValueError(
            f"{path} holds weights under {' and '.join(map(repr, found))}: keep one of them."
        )
    wrapper = found[0] if found else None
    weights = content[wrapper] if wrapper else content
    others = [key for key, value in weights.items() if not _is_weight(key, value)]
    if others or not weights:
        raise ValueError(
            f"{path} holds no state dict: wanted tensors, bare or under one of {WRAPPERS}, but "
            f"found {[str(key) for key in others[:5]] or 'nothing'}"
            f"{f' under {wrapper!r}' if wrapper else ''}."
        )
    return dict(weights), wrapper


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
