"""Released SAM 3 and EfficientSAM3 weights under the names of our checkpoint folder."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .key_tables import DROPS, MODULES, SPELLINGS, TWINS, VISION

LEAF = re.compile(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$")


@dataclass(frozen=True)
class Renamed:
    """A released state dict under our names.

    Args:
        weights: Our names to tensors. The parts of a fused projection are views of it, so that a
            memory-mapped file stays on disk.
        dropped: Source keys that have no place in our models, to the reason.
    """

    weights: dict[str, Tensor]
    dropped: dict[str, str]


def rename(state_dict: Mapping[str, Tensor]) -> Renamed:
    """Bring the weights of a released file under our names.

    Args:
        state_dict: Flat, under Meta's names in any of the released key forms. Need not be
            complete: what a model then lacks shows when it is loaded.
    """
    names = spell_alike(state_dict)
    reasons = find_reasons_to_drop(names.values())
    targets = find_targets(name for name in names.values() if name not in reasons)

    known = reasons.keys() | targets.keys()
    homeless = [key for key, name in names.items() if name not in known]
    if homeless:
        raise ValueError(
            f"{len(homeless)} of {len(state_dict)} weights match no pattern, for example "
            f"{homeless[:3]}. Add a row for them to MODULES, or a reason to DROPS, in "
            f"conversion/key_tables.py."
        )

    moves = {key: targets[name] for key, name in names.items() if name in targets}
    return Renamed(
        weights=_move_tensors(state_dict, moves),
        dropped={key: reasons[name] for key, name in names.items() if name in reasons},
    )


def spell_alike(keys: Iterable[str]) -> dict[str, str]:
    """Source keys to their names in the one form that the other tables know."""
    names = {}
    for key in keys:
        name = key
        for pattern, replacement in SPELLINGS:
            name = re.sub(pattern, replacement, name)
        names[key] = name
    _refuse_doubles(names)
    return names


def find_reasons_to_drop(names: Iterable[str]) -> dict[str, str]:
    """The names that this file holds and our models have no use for, to the reason."""
    names = list(names)
    reasons = {}
    for drop in DROPS:
        if any(name.startswith(drop.where) for name in names):
            unused = [name for name in names if re.fullmatch(drop.names, name)]
            reasons = dict.fromkeys(unused, drop.reason) | reasons  # the first reason stands
    return reasons


def find_targets(names: Iterable[str]) -> dict[str, str]:
    """Names to targets, marks included; a name that no row knows is absent."""
    names = list(names)
    found = {name: _find_target(nested) for name, nested in _nest_repvit(names).items()}
    targets = {name: target for name, target in found.items() if target is not None}
    _refuse_doubles(targets)
    return targets


def find_moves(keys: Iterable[str]) -> dict[str, str]:
    """Source keys to targets, marks included; keys that are dropped or unknown are absent."""
    names = spell_alike(keys)
    reasons = find_reasons_to_drop(names.values())
    targets = find_targets(name for name in names.values() if name not in reasons)
    return {key: targets[name] for key, name in names.items() if name in targets}


def _find_target(name: str) -> str | None:
    leaf = LEAF.search(name)
    stem, ending = (name[: leaf.start()], leaf.group()) if leaf else (name, "")
    for module in MODULES:
        if not stem.startswith(module.source):
            continue
        for pattern, replacement in module.rows:
            match = re.fullmatch(pattern, stem.removeprefix(module.source))
            if match:
                return module.target + match.expand(replacement) + ending
    return None


def _refuse_doubles(renamed: dict[str, str]) -> None:
    first: dict[str, str] = {}
    for key, name in renamed.items():
        if name in first:
            raise ValueError(
                f"{first[name]!r} and {key!r} are two forms of one weight, {name!r}. "
                f"Remove the one that is not meant from the file."
            )
        first[name] = key


def _nest_repvit(names: list[str]) -> dict[str, str]:
    """Every name, to the same with RepViT's flat list of blocks sorted into timm's stages.

    A stage begins with the block whose first convolution has no parallel branches, save the first
    one, which begins behind the stem.
    """
    trunk = f"{VISION}trunk.model.backbone.model."
    block = re.compile(rf"{re.escape(trunk)}features\.(\d+)\.(.+)")
    matches = {name: block.fullmatch(name) for name in names}
    found = [match for match in matches.values() if match]
    starts = [1, *sorted(int(m[1]) for m in found if m[2] == "token_mixer.0.c.weight")]
    return {
        name: f"{trunk}{_repvit_place(int(m[1]), starts)}.{m[2]}" if m and m[1] != "0" else name
        for name, m in matches.items()
    }


def _repvit_place(index: int, starts: list[int]) -> str:
    """Where timm keeps one block of RepViT, given the first block of each stage.

    The last block of a stage belongs to the downsampling that follows.

    >>> for index in (1, 3, 4, 5):
    ...     print(_repvit_place(index, starts=[1, 4, 8, 24]))
    stages.0.blocks.0
    stages.1.downsample.pre_block
    stages.1.downsample
    stages.1.blocks.0
    """
    stage = sum(start <= index for start in starts) - 1
    place = index - starts[stage]
    if index + 1 in starts:
        return f"stages.{stage + 1}.downsample.pre_block"
    if stage == 0:
        return f"stages.0.blocks.{place}"
    return f"stages.{stage}.downsample" if place == 0 else f"stages.{stage}.blocks.{place - 1}"


def _move_tensors(state_dict: Mapping[str, Tensor], moves: dict[str, str]) -> dict[str, Tensor]:
    """Tensors under their targets, changed as the marks of the targets say."""
    weights: dict[str, Tensor] = {}
    tables: dict[str, dict[int, Tensor]] = {}
    for key, target in moves.items():
        tensor = state_dict[key]
        row = re.search(r"\[(\d+)\]", target)
        if row:
            tables.setdefault(target.replace(row[0], ""), {})[int(row[1])] = tensor
        elif "{q,k,v}" in target:
            _refuse_shape(key, tensor, len(tensor.shape[:1]) == 1 and len(tensor) % 3 == 0)
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                weights[target.replace("{q,k,v}", letter)] = part
        elif target.endswith("^T"):
            _refuse_shape(key, tensor, tensor.ndim == 2)
            weights[target.removesuffix("^T")] = tensor.T.contiguous()
        elif target.endswith("[patches]"):
            weights[target.removesuffix("[patches]")] = _without_class_token(key, tensor)
        else:
            weights[target] = tensor

    for name, rows in tables.items():
        shapes = {row.shape[1:] for row in rows.values() if row.ndim}
        if len(shapes) != 1 or not all(row.ndim for row in rows.values()):
            raise ValueError(
                f"The rows of {name} have shapes {[tuple(row.shape) for row in rows.values()]}, "
                f"which make no table. Give the file as released."
            )
        weights[name] = torch.cat([rows[i] for i in sorted(rows)])
    for name, twin in TWINS.items():
        if name in weights:
            weights[twin] = weights[name].clone()
    return weights


def _refuse_shape(key: str, tensor: Tensor, is_right: bool) -> None:
    if not is_right:
        raise ValueError(
            f"{key} has shape {tuple(tensor.shape)}, which no model of this family has. Give the "
            f"file as released."
        )


def _without_class_token(key: str, positions: Tensor) -> Tensor:
    _refuse_shape(key, positions, positions.ndim == 3 and positions.shape[1] > 1)
    patches = positions.shape[1] - 1
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(
            f"{key} has {patches + 1} positions, which is not a class token and a square grid "
            f"as in SAM 3 (1 + 24 x 24). Give the file as released."
        )
    return positions[:, 1:].contiguous()
