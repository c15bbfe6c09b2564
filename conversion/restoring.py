"""The way back: tensors under our names to the names and shapes they were released in."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from .inverse_tables import find_released_names
from .key_tables import DROPS, SPELLINGS, TWINS
from .renaming import Renamed, find_moves

CLASS_TOKEN = "[class_token]"
MARK = re.compile(r"\[\d+\]|\[patches\]$|\^T$")
AWKWARD_SPELLINGS = SPELLINGS[:4]  # forms that no complete release has


def find_extras(source: Mapping[str, Tensor], renamed: Renamed) -> dict[str, Tensor]:
    """What of a released file our models have no place for, but the way back needs."""
    is_kept = {drop.reason: drop.is_kept_aside for drop in DROPS}
    extras = {key: source[key] for key, reason in renamed.dropped.items() if is_kept[reason]}
    for key, target in find_moves(source).items():
        if target.endswith("[patches]"):
            extras[key + CLASS_TOKEN] = source[key][:, :1]
    return extras


def spell_released(key: str) -> str:
    """A key of any form as complete releases spell it.

    >>> spell_released("inst_interactive_predictor.model.no_obj_ptr")
    'tracker.no_obj_ptr'
    >>> spell_released("backbone.vision_backbone.trunk.model.student_trunk.head.0.weight")
    'detector.backbone.vision_backbone.trunk.model.head.0.weight'
    """
    for pattern, replacement in AWKWARD_SPELLINGS:
        key = re.sub(pattern, replacement, key)
    return key if key.startswith("tracker.") else f"detector.{key}"


def restore(
    weights: Mapping[str, Tensor],
    extras: Mapping[str, Tensor],
    spellings: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The released state dict of a folder's weights.

    Args:
        weights: All weights of the folder under our names.
        extras: What `find_extras` set aside.
        spellings: Keys of the file that the folder was converted from, to our names; they are what
            a release with names of its own, as SAM 3.1, gets back.
    """
    _refuse_different_twins(weights)
    own = {name: tensor for name, tensor in weights.items() if name not in TWINS.values()}
    moves = find_released_names(own)
    original = {target: spell_released(key) for key, target in (spellings or {}).items()}
    result = {}
    for key, target in moves.items():
        key = original.get(target, key)
        result[key] = _undo(key, target, own, extras)
    for key, tensor in extras.items():
        if not key.endswith(CLASS_TOKEN):
            result[spell_released(key)] = tensor
    return result


def _undo(
    key: str, target: str, weights: Mapping[str, Tensor], extras: Mapping[str, Tensor]
) -> Tensor:
    """The tensor that a mark made out of one in the released file, turned back."""
    if "{q,k,v}" in target:
        return torch.cat([weights[target.replace("{q,k,v}", letter)] for letter in "qkv"])
    mark = MARK.search(target)
    tensor = weights[MARK.sub("", target)]
    if mark is None:
        return tensor
    if mark[0] == "^T":
        return tensor.T.contiguous()
    if mark[0] == "[patches]":
        return torch.cat([_find_class_token(key, tensor, extras), tensor], dim=1)
    row = int(mark[0][1:-1])
    return tensor[row : row + 1].clone()


def _find_class_token(key: str, positions: Tensor, extras: Mapping[str, Tensor]) -> Tensor:
    """The row that no model reads: the original's, or zeros where a model was trained since."""
    for name, tensor in extras.items():
        if name.endswith(CLASS_TOKEN) and spell_released(name.removesuffix(CLASS_TOKEN)) == key:
            return tensor
    return torch.zeros_like(positions[:, :1])


def _refuse_different_twins(weights: Mapping[str, Tensor]) -> None:
    for name, twin in TWINS.items():
        if name in weights and twin in weights and not torch.equal(weights[name], weights[twin]):
            raise ValueError(
                f"{name} and {twin} differ, but a released file has one place for both. They are "
                f"one fixed table of random frequencies: make them equal again."
            )
