"""Results to keep, to show and to compare: JSON, Markdown, and the record beside the weights."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from math import hypot, isfinite
from pathlib import Path

from .bootstrap import Difference, Interval

# Beside the weights of a model; cards are written from it (docs/model_cards.md).
HUB_RECORD = "evaluation_results.json"
HUB_FIELDS = (
    *("task", "dataset", "split", "metric", "value", "command", "hardware", "date", "revision"),
    *("dataset_id", "dataset_revision", "benchmark_task"),
)


@dataclass(frozen=True)
class Measurement:
    """One number that was measured, with all it takes to measure it again.

    Args:
        model: Folder or Hub name of what was measured.
        task: What it did, e.g. `"promptable-concept-segmentation"`.
        dataset: Name for readers, e.g. `"SA-Co/Gold"`.
        split: Part of it, e.g. `"test"`.
        metric: Name of the number, e.g. `"cgF1"`.
        value: The number, in the unit that is reported: shares in percent.
        command: The command that gives it.
        hardware: What that ran on.
        date: The day, as 2026-11-21.
        revision: Commit of the code that ran.
        low: Lower end of its confidence interval; None where there is none.
        high: Upper end.
        units: Number of images, pairs, objects or videos.
        draws: Of the bootstrap that the interval is from.
        seed: Of these draws.
        dataset_id: The data set on the Hub; None where it is not there.
        dataset_revision: Commit of the data set.
        benchmark_task: Task in the data set's `eval.yaml`, if it is a benchmark of the Hub.
    """

    model: str
    task: str
    dataset: str
    split: str
    metric: str
    value: float
    command: str
    hardware: str
    date: str
    revision: str
    low: float | None = None
    high: float | None = None
    units: int | None = None
    draws: int | None = None
    seed: int | None = None
    dataset_id: str | None = None
    dataset_revision: str | None = None
    benchmark_task: str | None = None

    @property
    def setting(self) -> tuple[str, ...]:
        """What two results must share to be compared."""
        return self.task, self.dataset, self.split, self.metric


@dataclass(frozen=True)
class Change:
    """The same number of two results.

    Args:
        first: Of the result that is compared with.
        second: Of the other.
        exceeds_noise: The change is more than chance; None where nothing says how much that is.
        low: Lower end of the change; None where the two were not drawn together.
        high: Upper end.
    """

    first: Measurement
    second: Measurement
    exceeds_noise: bool | None
    low: float | None = None
    high: float | None = None


def measurements(
    summary: Mapping[str, float | Interval],
    template: Measurement,
    *,
    metrics: Sequence[str] | None = None,
    scale: float = 100.0,
) -> list[Measurement]:
    """One measurement for each number of a summary.

    Args:
        summary: From a `summarize`, or from `bootstrap.intervals`.
        template: Has everything but metric, value and interval.
        metrics: Names to keep, in this order; None keeps all. Numbers that are undefined (nan) are
            left out.
        scale: 100 for shares; 1 for milliseconds, bytes and the like.
    """
    results = []
    for name in metrics or list(summary):
        if name not in summary:
            raise KeyError(f"There is no {name!r} among {sorted(summary)}.")
        number = summary[name]
        ends: dict[str, float | None] = {"low": None, "high": None}
        if isinstance(number, Interval):
            ends = {"low": _scaled(number.low, scale), "high": _scaled(number.high, scale)}
            number = number.value
        if isfinite(number):
            results.append(replace(template, metric=name, value=float(number) * scale, **ends))
    return results


def write_json(results: Sequence[Measurement], path: str | os.PathLike) -> None:
    """Save measurements in full."""
    text = json.dumps([asdict(result) for result in results], indent=2, allow_nan=False)
    Path(path).write_text(f"{text}\n", encoding="utf-8")


def read_json(path: str | os.PathLike) -> list[Measurement]:
    """Measurements that `write_json` saved."""
    known = {field.name for field in fields(Measurement)}
    results = []
    for entry in json.loads(Path(path).read_text(encoding="utf-8")):
        if unknown := entry.keys() - known:
            raise ValueError(f"{path} has fields that a measurement does not: {sorted(unknown)}.")
        results.append(Measurement(**entry))
    return results


def write_hub_record(results: Sequence[Measurement], folder: str | os.PathLike) -> Path:
    """Add results to `evaluation_results.json` beside the weights of one model.

    An older entry of the same task, data set, split, metric and hardware is replaced.
    """
    models = sorted({result.model for result in results})
    if len(models) > 1:
        raise ValueError(f"A folder holds one model, not {models}: write them one by one.")
    path = Path(folder) / HUB_RECORD
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    new = [{name: getattr(result, name) for name in HUB_FIELDS} for result in results]
    replaced = {_hub_key(entry) for entry in new}
    entries = [entry for entry in entries if _hub_key(entry) not in replaced] + new
    path.write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    return path


def markdown_table(results: Sequence[Measurement], decimals: int = 1) -> str:
    """One row for each model, one column for each number; intervals in brackets."""
    several = len({(result.dataset, result.split) for result in results}) > 1
    columns = list(dict.fromkeys(_column(result, several) for result in results))
    rows: dict[str, dict[str, str]] = {}
    for result in results:
        rows.setdefault(result.model, {})[_column(result, several)] = _shown(result, decimals)
    lines = [["model", *columns], ["---"] + ["---:"] * len(columns)]
    lines += [[model, *(cells.get(name, "–") for name in columns)] for model, cells in rows.items()]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def changes(
    first: Sequence[Measurement],
    second: Sequence[Measurement],
    paired: Mapping[str, Difference] | None = None,
    scale: float = 100.0,
) -> list[Change]:
    """Numbers that two results share, and whether they differ by more than chance.

    Args:
        first: Result to compare with.
        second: The other.
        paired: From `bootstrap.differences` on the units of both, by metric: the sharpest answer.
            Without it, a change exceeds noise if it is larger than both half intervals together, as
            for independent results (root of the sum of squares).
        scale: What `paired` is multiplied by.
    """
    before = {result.setting: result for result in first}
    found = []
    for result in second:
        if result.setting not in before:
            continue
        old = before[result.setting]
        if paired is not None and result.metric in paired:
            drawn = paired[result.metric]
            ends = drawn.low * scale, drawn.high * scale
            found.append(Change(old, result, drawn.exceeds_noise, *ends))
        else:
            found.append(Change(old, result, _is_apart(old, result)))
    return found


def markdown_changes(found: Sequence[Change], decimals: int = 2) -> str:
    """A table of changes with a verdict for each."""
    words = {True: "more than noise", False: "within noise", None: "unknown"}
    lines = [
        ["data set", "number", "first", "second", "change", "interval", "verdict"],
        ["---", "---", "---:", "---:", "---:", "---:", "---"],
    ]
    for change in found:
        delta = change.second.value - change.first.value
        ends = "–"
        if change.low is not None and change.high is not None:
            ends = f"{change.low:+.{decimals}f} to {change.high:+.{decimals}f}"
        lines.append(
            [
                f"{change.second.dataset} {change.second.split}",
                change.second.metric,
                f"{change.first.value:.{decimals}f}",
                f"{change.second.value:.{decimals}f}",
                f"{delta:+.{decimals}f}",
                ends,
                words[change.exceeds_noise],
            ]
        )
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines) + "\n"


def _is_apart(first: Measurement, second: Measurement) -> bool | None:
    if first.low is None or first.high is None or second.low is None or second.high is None:
        return None
    noise = hypot((first.high - first.low) / 2, (second.high - second.low) / 2)
    return abs(second.value - first.value) > noise


def _hub_key(entry: Mapping[str, object]) -> tuple:
    return tuple(entry.get(name) for name in ("task", "dataset", "split", "metric", "hardware"))


def _column(result: Measurement, several: bool) -> str:
    return f"{result.dataset} {result.split}: {result.metric}" if several else result.metric


def _shown(result: Measurement, decimals: int) -> str:
    if result.low is None or result.high is None:
        return f"{result.value:.{decimals}f}"
    return f"{result.value:.{decimals}f} [{result.low:.{decimals}f}, {result.high:.{decimals}f}]"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _scaled(value: float, scale: float) -> float | None:
    return value * scale if isfinite(value) else None
