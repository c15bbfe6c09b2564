"""Writes the folder that `from_pretrained` reads: all of it, or nothing."""

import contextlib
import glob
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor

from efficientsam3_hf import zoo
from efficientsam3_hf.hub.model_card import keep_own_card, write_model_card
from efficientsam3_hf.hub.results import MANIFEST_FILE
from efficientsam3_hf.models.configuration_efficientsam3 import EfficientSam3Config

EXTRAS_FILE = "original_extras.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
MAX_SHARD = "5GB"


@contextlib.contextmanager
def atomic_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """A folder to write into, which takes its place as `target` only when it is complete.

    It stands beside the target, hidden, so that the last step is a single rename. What a killed
    process left there goes, or takes its place again, when the same target is written again.
    """
    target = Path(target).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    _refuse_taken(target, overwrite)
    prefix = f".{target.name}.partial-"
    for leftover in target.parent.glob(f"{glob.escape(prefix)}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    partial = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    partial.chmod(0o755)  # mkdtemp's own folders are for one user alone
    try:
        yield partial
        _take_place(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def refuse_overwriting(target: Path, sources: Iterable[Path]) -> None:
    """Raise if what is to be read lies in the folder that is to be replaced."""
    for source in sources:
        if source.resolve().is_relative_to(target.resolve()):
            raise ValueError(
                f"{source} lies in {target}, which would be replaced. Choose another --output."
            )


def _recover(target: Path) -> None:
    """Put back what a process set aside that was killed before the new folder stood there."""
    for aside in target.parent.glob(f"{glob.escape(f'.{target.name}.replaced-')}*"):
        if any(aside.iterdir()) and not target.exists():
            aside.replace(target)
        else:  # the new folder stands, with whatever card of another hand was in the old one
            shutil.rmtree(aside)


def _refuse_taken(target: Path, overwrite: bool) -> None:
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file. Choose another name for the folder.")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise FileExistsError(f"{target} is not empty. Choose another folder, or pass --overwrite.")
    is_model = any((target / name).is_file() for name in (MANIFEST_FILE, "config.json"))
    if target.is_dir() and any(target.iterdir()) and not is_model:
        raise FileExistsError(
            f"{target} holds no model (neither {MANIFEST_FILE} nor config.json), so --overwrite "
            f"does not replace it. Choose another folder, or empty it."
        )


def _take_place(partial: Path, target: Path) -> None:
    if not target.exists() or not any(target.iterdir()):
        partial.replace(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.replaced-", dir=target.parent))
    target.replace(aside)
    try:
        partial.replace(target)
    except BaseException:
        aside.replace(target)
        raise
    shutil.rmtree(aside)


def write_weights(weights: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Store weights as `model.safetensors`, or in shards with their index where they are large."""
    weights = _storable(weights)
    split = split_torch_state_dict_into_shards(
        weights, filename_pattern="model{suffix}.safetensors", max_shard_size=MAX_SHARD
    )
    for file, names in split.filename_to_tensors.items():
        _save({name: weights[name] for name in names}, folder / file)
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return [folder / file for file in split.filename_to_tensors]


def write_extras(extras: Mapping[str, Tensor], folder: Path) -> list[Path]:
    """Store what no model reads, but what the way back needs."""
    if not extras:
        return []
    _save(_storable(extras), folder / EXTRAS_FILE)
    return [folder / EXTRAS_FILE]


def write_companions(configuration: EfficientSam3Config, folder: Path) -> None:
    """Store configuration, and processor with tokenizer."""
    configuration.architectures = ["EfficientSam3Model"]
    configuration.save_pretrained(folder)
    zoo.processor(configuration).save_pretrained(folder)


def write_card(folder: Path, target: Path) -> None:
    """Store licence and model card, once weights and manifest are there.

    Args:
        folder: The folder that is being written.
        target: The one whose place it takes; its card stays if another hand wrote it.
    """
    keep_own_card(target, folder)
    write_model_card(folder, name=Path(os.path.abspath(target)).name)


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file(tensors, path, {"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it to its writer alone


def _storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors, contiguous, none of them lying in another's place."""
    places: dict[int, list[range]] = {}  # by storage
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.contiguous()
        start = tensor.data_ptr()
        place = range(start, start + tensor.nbytes)
        taken = places.setdefault(tensor.untyped_storage().data_ptr(), [])
        overlaps = any(place.start < other.stop and other.start < place.stop for other in taken)
        result[name] = tensor.clone() if overlaps else tensor
        taken.append(place)
    return result
