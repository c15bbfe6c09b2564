"""The scores of this folder as metrics of the `evaluate` library, which loads them by path.

    import evaluate
    from efficientsam3_hf.evaluation.metrics import metric_path

    cgf1 = evaluate.load(metric_path("concept"))

Masks are compressed run-length encodings with text counts, `ABSENT` where a frame has none.
"""

from pathlib import Path

# Arrow and `evaluate` agree on no None among masks.
ABSENT = {"size": [0, 0], "counts": ""}

FOLDER = Path(__file__).parent


def metric_names() -> list[str]:
    """Names for `metric_path`."""
    return sorted(path.parent.name for path in FOLDER.glob("*/*.py"))


def or_none(masks: list[dict]) -> list[dict | None]:
    """Masks with None in place of `ABSENT`."""
    return [mask if mask["counts"] else None for mask in masks]


def metric_path(name: str) -> str:
    """The folder that `evaluate.load` takes."""
    if name not in metric_names():
        raise ValueError(f"There is no metric {name!r}; there are {', '.join(metric_names())}.")
    return str(FOLDER / name)
