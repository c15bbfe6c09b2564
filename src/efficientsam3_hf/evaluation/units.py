"""What was counted for each unit (image, pair, object, video): stacked, joined, kept on disk.

Every score is computed in two steps: `score_...` looks at one unit and returns a record, a flat
dictionary of numbers; `summarize` turns the records of all units into the numbers that are
reported. Records can be written by several processes, joined, and drawn anew by the bootstrap.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

# Field -> one row for each unit.
Units = dict[str, np.ndarray]


def stack(records: Sequence[Mapping[str, object]]) -> Units:
    """Records of units, one below the other.

    >>> stack([{"iou": 0.5}, {"iou": 1.0}])
    {'iou': array([0.5, 1. ])}
    """
    if not records:
        raise ValueError("There is no unit to score: the list of records is empty.")
    names = list(records[0])
    for index, record in enumerate(records):
        if set(record) != set(names):
            raise ValueError(
                f"Record {index} has the fields {sorted(record)}, the first has {sorted(names)}; "
                "stack records of one kind only."
            )
    return {name: np.asarray([record[name] for record in records]) for name in names}


def join(parts: Sequence[Units]) -> Units:
    """Units of several processes or runs as one, in their order."""
    if not parts:
        raise ValueError("There are no parts to join.")
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def count(units: Units) -> int:
    """Number of units."""
    return len(next(iter(units.values())))


def weights_or_ones(weights: np.ndarray | None, units: Units) -> np.ndarray:
    """How often each unit counts; once, if nothing is said."""
    if weights is None:
        return np.ones(count(units))
    if len(weights) != count(units):
        raise ValueError(f"{len(weights)} weights for {count(units)} units.")
    return np.asarray(weights, dtype=np.float64)


def save(units: Units, path: str | os.PathLike) -> None:
    """Keep units in an `.npz` file, so that a later run can be compared with this one."""
    with Path(path).open("wb") as file:
        np.savez_compressed(file, **units)  # pyright: ignore[reportArgumentType]: numpy's own flag


def load(path: str | os.PathLike) -> Units:
    """Units that `save` wrote."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
