"""Opens files of weights without running what they contain, and without reading them whole."""

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

SUFFIXES = (".pt", ".pth", ".safetensors")
WRAPPERS = ("model", "state_dict")
TRANSFORMERS_INDEX = "model.safetensors.index.json"
TRANSFORMERS_WEIGHTS = "model.safetensors"

# What trainers keep beside the weights, and no model reads.
TRAINING_STATE = re.compile(r"(?i)optim|sched|scaler|loss|rng|random|amp$|callback|metric|sampler")
STATE_REASON = "state of a training (optimizer, schedule, scaler, ...), which no model reads"


@dataclass(frozen=True)
class WeightFile:
    """Flat weights of one checkpoint.

    Args:
        paths: The files that hold them: one, or the shards of a transformers folder.
        weights: Keys to tensors, which stay on disk until they are used.
        wrapper: Key under which the file keeps its weights; None where they lie bare.
        state: Keys beside the wrapper that hold tensors of a training's state.
    """

    paths: tuple[Path, ...]
    weights: dict[str, Tensor]
    wrapper: str | None = None
    state: dict[str, str] = field(default_factory=dict)


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
    content = _read_torch(path)
    weights, wrapper = _unwrap(content, path)
    return WeightFile((path,), weights, wrapper, _find_state(content, wrapper, path))


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
    shards = tuple(folder / name for name in _names_of_shards(folder))
    weights: dict[str, Tensor] = {}
    for shard in shards:
        weights |= _read_safetensors(shard)
    return WeightFile(shards, weights)


def _names_of_shards(folder: Path) -> list[str]:
    index = folder / TRANSFORMERS_INDEX
    if not index.is_file():
        return [TRANSFORMERS_WEIGHTS]
    if (folder / TRANSFORMERS_WEIGHTS).is_file():
        raise ValueError(
            f"{folder} holds both {TRANSFORMERS_WEIGHTS} and {TRANSFORMERS_INDEX}, as when a model "
            f"is saved over another one. transformers reads the first: delete what is stale."
        )
    try:
        return sorted(
            {Path(name).name for name in json.loads(index.read_text())["weight_map"].values()}
        )
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is no index of shards ({error}): fetch it again.") from error


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)  # views of the mapped file
    except Exception as error:  # a damaged header has many kinds
        raise ValueError(
            f"{path} cannot be read as safetensors ({error}). It may be truncated: compare its "
            f"size with the original's, and fetch it again."
        ) from error


def _read_torch(path: Path) -> Any:
    """What torch saved, only tensors and plain containers being allowed in it."""
    with path.open("rb") as file:
        is_archive = file.read(2) == b"PK"
    try:
        if is_archive and not zipfile.is_zipfile(path):
            raise EOFError("it ends before its table of contents")
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
    except Exception as error:  # a damaged file can fail anywhere in torch, zipfile and pickle
        raise ValueError(
            f"{path} cannot be read: {_reason(error)}. It may be damaged or truncated: compare its "
            f"size ({path.stat().st_size:,} bytes) with the original's, and fetch it again."
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
    _refuse_valueless(weights, path)
    others = [key for key, value in weights.items() if not _is_weight(key, value)]
    if others or not weights:
        raise ValueError(
            f"{path} holds no state dict: wanted tensors, bare or under one of {WRAPPERS}, but "
            f"found {[str(key) for key in others[:5]] or 'nothing'}"
            f"{f' under {wrapper!r}' if wrapper else ''}."
        )
    return dict(weights), wrapper


def _refuse_valueless(weights: Mapping[Any, Any], path: Path) -> None:
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            continue
        is_tiny_float = value.is_floating_point() and value.itemsize == 1
        if value.is_meta or value.is_quantized or is_tiny_float:
            kind = "without values, on the meta device" if value.is_meta else f"as {value.dtype}"
            raise ValueError(
                f"{path} holds {key!r} {kind}. Give plain tensors of 16 bits or more: load the "
                f"weights, or dequantise them, and save them again."
            )


def _find_state(content: Mapping[str, Any], wrapper: str | None, path: Path) -> dict[str, str]:
    """Keys beside the wrapper that are left out, to the reason; further weights are an error."""
    if wrapper is None:
        return {}
    holding = [key for key in content if key != wrapper and _holds_tensors(content[key])]
    state = [key for key in holding if TRAINING_STATE.search(str(key))]
    others = [str(key) for key in holding if key not in state]
    if others:
        raise ValueError(
            f"{path} holds tensors beside {wrapper!r}, under {others[:3]}"
            f"{' and others' if len(others) > 3 else ''}, and it is not clear which of them are "
            f'meant. Save those alone, as torch.save({{"model": weights}}, "chosen.pt"), and '
            f"convert that file."
        )
    return {str(key): STATE_REASON for key in state}


def _holds_tensors(value: Any) -> bool:
    """Whether there is a tensor anywhere in nested containers."""
    waiting, seen = [value], set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            return True
        if id(value) not in seen:
            seen.add(id(value))
            if isinstance(value, Mapping):
                waiting += value.values()
            elif isinstance(value, list | tuple | set):
                waiting += value
    return False


def _is_weight(key: Any, value: Any) -> bool:
    return isinstance(key, str) and isinstance(value, Tensor) and value.layout == torch.strided
