"""The key tables read from right to left: our names to released ones.

Several names of Meta's may have become one of ours. Which is meant follows from the other weights,
and whatever is found must lead back to our names through `renaming.py`, or it is an error.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from .key_tables import CLIP_TEXT, EFFICIENTVIT, MOBILECLIP_TEXT, MODULES, REPVIT, TINYVIT, Module
from .recognition import CLIP_POSITIONS, FAMILIES
from .renaming import LEAF, find_moves

FAMILY_ROWS = {"repvit": REPVIT, "tinyvit": TINYVIT, "efficientvit": EFFICIENTVIT}
TRUNK = "backbone.vision_backbone.trunk.model.backbone.model."
ROW_MARK = r"[\1]"


class InverseRow(NamedTuple):
    """How one row of a table reads backwards.

    Args:
        ours: What matches our stems.
        target: The row's target, for the marks in it.
        pieces: The released stem: fixed text, and numbers of the groups that go between.
    """

    ours: re.Pattern[str]
    target: str
    pieces: tuple[str | int, ...]


def find_released_names(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Released keys to our names with the mark that says how the tensor changed."""
    modules = [
        (module, [invert_row(*row) for row in module.rows]) for module in _modules_of(weights)
    ]
    found: dict[str, str] = {}
    homeless = []
    for name, tensor in weights.items():
        names = _released_names(name, len(tensor) if tensor.ndim else 1, modules)
        found |= names
        homeless += [] if names else [name]
    if homeless:
        raise ValueError(
            f"{len(homeless)} of {len(weights)} weights have no place in a released file, for "
            f"example {homeless[:3]}. Only models of the released architecture can be written "
            f"back: not fused ones, those with the lateral neck, or those with parts of their own."
        )
    found = dict(zip(_flatten_repvit(_number_deconvolutions(found)), found.values(), strict=True))
    keys = {_spell(name): target for name, target in found.items()}
    assert find_moves(keys) == keys, "the tables do not lead back"
    return keys


def _modules_of(weights: Iterable[str]) -> list[Module]:
    """The modules whose names these weights have."""
    names = set(weights)
    unused = [rows for family, rows in FAMILY_ROWS.items() if FAMILIES[family] not in names]
    unused.append(MOBILECLIP_TEXT if CLIP_POSITIONS in names else CLIP_TEXT)
    return [
        module
        for module in MODULES
        if not any(module.rows is rows for rows in unused)
        and not module.source.startswith("tracker.interactive_")
    ]


def _released_names(
    name: str, rows: int, modules: list[tuple[Module, list[InverseRow]]]
) -> dict[str, str]:
    """The released names that one of ours came from, to what became of them."""
    leaf = LEAF.search(name)
    stems = [(name[: leaf.start()], leaf.group())] if leaf else []
    stems.append((name, ""))
    for module, inverse_rows in modules:
        for stem, ending in stems:
            if not stem.startswith(module.target):
                continue
            for row in inverse_rows:
                match = row.ours.fullmatch(stem.removeprefix(module.target))
                if match:
                    return _expand(module, row, match, ending, rows)
    return {}


def _expand(
    module: Module, row: InverseRow, match: re.Match[str], ending: str, rows: int
) -> dict[str, str]:
    values = {int(key[1:]): value for key, value in match.groupdict().items()}
    names = {}
    for index in range(rows) if ROW_MARK in row.target else [None]:
        filled = values if index is None else {1: str(index)}
        text = [filled[piece] if isinstance(piece, int) else piece for piece in row.pieces]
        target = row.target
        for number, value in filled.items():
            target = target.replace(f"\\{number}", value)
        names[module.source + "".join(text) + ending] = module.target + target + ending
    return names


def invert_row(pattern: str, target: str) -> InverseRow:
    """Read one row of a table backwards."""
    groups, pieces = _parse(pattern)
    used = {int(number) for number in re.findall(r"\\(\d)", target)}
    ours = ""
    for text in re.split(r"(\[\\1\]|\\\d|\{q,k,v\}|\[patches\]|\^T)", target):
        if text in (ROW_MARK, "[patches]", "^T"):
            continue
        if text == "{q,k,v}":
            ours += "[qkv]"
        elif text.startswith("\\"):
            number = int(text[1:])
            again = f"(?P<g{number}>" in ours
            ours += f"(?P=g{number})" if again else f"(?P<g{number}>{groups[number]})"
        else:
            ours += re.escape(text)
    kept = (piece for piece in pieces if not isinstance(piece, int) or piece in used)
    return InverseRow(re.compile(ours), target, tuple(kept))


def _parse(pattern: str) -> tuple[dict[int, str], list[str | int]]:
    """The capturing groups of a pattern, and its text with group numbers in between.

    Of alternatives that are not captured, the first is taken; what is optional is left out.
    """
    groups: dict[int, str] = {}
    pieces: list[str | int] = []
    number, position = 0, 0
    while position < len(pattern):
        if pattern[position] != "(":
            end = pattern.find("(", position)
            end = len(pattern) if end < 0 else end
            pieces.append(pattern[position:end].replace("\\.", "."))
            position = end
            continue
        inside, position = _closing(pattern, position)
        is_optional = pattern[position : position + 1] == "?"
        position += is_optional
        if inside.startswith("?:"):
            first = inside[2:].split("|")[0].replace("\\.", ".")
            pieces.append("" if is_optional else first)
            continue
        number += 1
        groups[number] = re.sub(r"\((?!\?)", "(?:", inside)
        pieces.append(number)
        number += len(re.findall(r"\((?!\?)", inside))
    return groups, pieces


def _closing(pattern: str, start: int) -> tuple[str, int]:
    """What the bracket at `start` holds, and the position behind it."""
    depth = 0
    for position in range(start, len(pattern)):
        depth += {"(": 1, ")": -1}.get(pattern[position], 0)
        if depth == 0:
            return pattern[start + 1 : position], position + 1
    raise AssertionError(f"{pattern} has an open bracket")


def _number_deconvolutions(names: Iterable[str]) -> list[str]:
    """A level's first deconvolution is numbered only where it has a second."""
    names = list(names)
    known = set(names)
    return [
        name.replace(".dconv_2x2.", ".dconv_2x2_0.")
        if name.replace(".dconv_2x2.", ".dconv_2x2_1.") in known
        else name
        for name in names
    ]


def _flatten_repvit(names: Iterable[str]) -> list[str]:
    """RepViT's blocks, from timm's stages back into one list."""
    names = list(names)
    place = r"downsample\.pre_block|downsample|blocks\.\d+"
    nested = re.compile(rf"{re.escape(TRUNK)}stages\.(\d)\.({place})\.(.+)")
    matches = {name: m for name in names if (m := nested.fullmatch(name))}
    if not any("token_mixer" in name for name in matches):
        return names
    starts = [1]
    for stage in range(3):
        blocks = {m[2] for m in matches.values() if m[1] == str(stage) and "blocks" in m[2]}
        # the stride-2 block of later stages, and the one that closes the stage
        starts.append(starts[-1] + (stage > 0) + len(blocks) + 1)
    return [
        f"{TRUNK}features.{_repvit_index(m[1], m[2], starts)}.{m[3]}"
        if (m := matches.get(name))
        else name
        for name in names
    ]


def _repvit_index(stage: str, place: str, starts: list[int]) -> int:
    start = starts[int(stage)]
    if place == "downsample.pre_block":
        return start - 1
    if place == "downsample":
        return start
    return start + int(place.removeprefix("blocks.")) + (stage != "0")


def _spell(name: str) -> str:
    key = re.sub(r"\.in_proj\.(weight|bias)$", r".in_proj_\1", name)
    return key if key.startswith("tracker.") else f"detector.{key}"
