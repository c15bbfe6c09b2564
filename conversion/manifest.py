"""The record of a conversion: what came from where, by which rule, and what was left out."""

import hashlib
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from efficientsam3_hf.hub.results import MANIFEST_FILE

from .key_tables import MODULES
from .parts import split_parts
from .renaming import LEAF, spell_alike

PACKAGES = (
    "efficientsam3-hf", "transformers", "torch", "torchvision", "timm", "safetensors",
    "huggingface_hub", "tokenizers", "ftfy",
)  # fmt: skip
CHUNK = 1 << 22


def describe_file(path: Path, show_progress: bool = False) -> dict[str, Any]:
    """Name, size and sha256 of a file."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    bar = tqdm(total=size, unit="B", unit_scale=True, desc=path.name, disable=not show_progress)
    with path.open("rb") as file, bar:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
            bar.update(len(chunk))
    return {"file": path.name, "bytes": size, "sha256": digest.hexdigest()}


def describe_versions() -> dict[str, str]:
    """Versions of everything that had a hand in it."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def count_rules(moves: Mapping[str, str]) -> list[dict[str, Any]]:
    """How many tensors went by each module of the key tables."""
    names = spell_alike(moves)
    counts = Counter(_rule_of(names[key], target) for key, target in moves.items())
    return [
        {"from": source, "to": target, "tensors": number}
        for (source, target), number in counts.items()
    ]


def _rule_of(name: str, target: str) -> tuple[str, str]:
    stem = LEAF.sub("", name)
    for module in MODULES:
        if stem.startswith(module.source) and target.startswith(module.target):
            return f"{module.source}*", f"{module.target}*"
    raise AssertionError(f"{name} became {target} by no rule")


def describe_dropped(dropped: Mapping[str, str], kept: Iterable[str]) -> list[dict[str, Any]]:
    """The keys left out, by reason, and whether they are kept beside the weights."""
    kept = set(kept)
    reasons: dict[tuple[str, bool], list[str]] = {}
    for key, reason in dropped.items():
        reasons.setdefault((reason, key in kept), []).append(key)
    return [
        {"reason": reason, "is_kept_beside_the_weights": is_kept, "count": len(keys), "keys": keys}
        for (reason, is_kept), keys in reasons.items()
    ]


def describe_parts(weights: Mapping[str, Tensor], donated: Iterable[str]) -> list[dict[str, Any]]:
    """The parts of a folder, their sizes, and who gave them."""
    donated = set(donated)
    return [
        {
            "part": name,
            "from": "donor" if name in donated else "source",
            "tensors": len(tensors),
            "numbers": sum(tensor.numel() for tensor in tensors.values()),
        }
        for name, tensors in split_parts(weights).items()
    ]


def write_manifest(record: Mapping[str, Any], folder: Path) -> None:
    """Save a record beside the weights."""
    (folder / MANIFEST_FILE).write_text(json.dumps(record, indent=2) + "\n")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The record of a folder; None where it was not converted."""
    path = folder / MANIFEST_FILE
    return json.loads(path.read_text()) if path.is_file() else None


def format_report(record: Mapping[str, Any]) -> str:
    """The record as a table for the terminal."""
    lines = [f"{record['source']['address']} is {record['name']}", ""]
    lines.append(f"{'part':38} {'from':8} {'tensors':>8} {'numbers':>13}")
    for part in record["parts"]:
        lines.append(
            f"{part['part']:38} {part['from']:8} {part['tensors']:8,} {part['numbers']:13,}"
        )
    for drop in record["dropped"]:
        where = "kept beside the weights" if drop["is_kept_beside_the_weights"] else "not kept"
        lines += ["", f"left out, {where}: {drop['count']:,} tensors, e.g. {drop['keys'][0]}"]
        lines.append(f"  {drop['reason']}")
    for note in record["notes"]:
        lines += ["", f"note: {note}"]
    return "\n".join(lines)
