"""Records that lie beside the weights: what was measured, and how the model was trained.

Each is a JSON list of flat objects, so that whoever measures or trains need not import this file.
Results leave it in the two forms that the Hub reads: `model-index` and `.eval_results/*.yaml`.
"""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import TypeVar

from huggingface_hub import EvalResult, EvalResultEntry, eval_result_entries_to_yaml
from huggingface_hub.utils import yaml_dump

RESULTS_FILE = "evaluation_results.json"
TRAINING_FILE = "training_record.json"
MANIFEST_FILE = "conversion_manifest.json"
HUB_RESULTS_FOLDER = ".eval_results"
HUB_RESULTS_MARKER = f"# Written by efficientsam3_hf from {RESULTS_FILE}."


@dataclass(frozen=True)
class Result:
    """One number that was measured, with all it takes to measure it again.

    Args:
        task: What the model did, e.g. `"promptable-concept-segmentation"`.
        dataset: Name for readers, e.g. `"SA-Co/Gold"`.
        split: Part of the dataset, e.g. `"test"`.
        metric: What was measured, e.g. `"cgF1"`.
        value: The number.
        command: The command that gives it.
        hardware: What that ran on.
        date: The day, as 2026-11-21.
        revision: Commit of the code that ran.
        dataset_id: The dataset on the Hub; None where it is not there.
        dataset_revision: Commit of the dataset.
        benchmark_task: Task in the dataset's `eval.yaml`, if the dataset is a benchmark of the Hub;
            None takes the metric's name.
    """

    task: str
    dataset: str
    split: str
    metric: str
    value: float
    command: str
    hardware: str
    date: str
    revision: str
    dataset_id: str | None = None
    dataset_revision: str | None = None
    benchmark_task: str | None = None

    def __post_init__(self) -> None:
        optional = ("dataset_id", "dataset_revision", "benchmark_task")
        _hide_in_command(self)
        _check_texts(self, optional, leave_out=("value",))
        number = self.value
        if isinstance(number, bool | str) or not math.isfinite(number):
            raise ValueError(f"value={number!r} is no measured number.")
        if type(number) not in (int, float):  # numpy's numbers are no YAML
            object.__setattr__(self, "value", float(number))
        try:
            date.fromisoformat(self.date)
        except ValueError as error:
            raise ValueError(f"date={self.date!r} is no day: write it as 2026-11-21.") from error


@dataclass(frozen=True)
class TrainingRecord:
    """One stage of a model's training.

    Args:
        stage: Name of the stage, e.g. `"encoder distillation"`.
        teacher: What it learned from, e.g. `"facebook/sam3"`.
        datasets: Ids on the Hub, or names.
        command: The command that trained it.
        steps: Steps of the optimizer.
        hardware: What that ran on.
        initial_weights: Part -> where its weights came from before this stage, or `"random"`. Of
            the text tower (`"text tower"`) it decides which licence holds.
        hyper_parameters: Name -> value, as readers are told.
    """

    stage: str
    teacher: str
    datasets: Sequence[str]
    command: str
    steps: int
    hardware: str
    initial_weights: dict[str, str] = field(default_factory=dict)
    hyper_parameters: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _hide_in_command(self)
        _check_texts(self, leave_out=("datasets", "steps", "initial_weights", "hyper_parameters"))
        if isinstance(self.datasets, str):
            raise TypeError(f"datasets={self.datasets!r} must be a list of names.")
        object.__setattr__(self, "datasets", tuple(str(name) for name in self.datasets))
        if isinstance(self.steps, bool) or int(self.steps) != self.steps or self.steps < 0:
            raise ValueError(f"steps={self.steps!r} is no number of steps.")


# A token of the Hub, or whatever is given to something called a token, key, secret or password.
NAMED = r"(?i:token|api[_-]?key|secret|password)"
SECRET = re.compile(
    rf"hf_\w{{8,}}|(?:--[\w-]*{NAMED}(?:=|\s+)|(?<![\w$])\w*{NAMED}=)(?=[^\s$-])(?P<value>\S+)"
)
ABSOLUTE = re.compile(r"(?<![^\s=\"':])(?:~|/[\w.-]+)/[^\s\"']+")


def hide_secrets(command: str) -> str:
    """A command without what must not be read by others.

    >>> hide_secrets("HF_TOKEN=abc python train.py --hub_token hf_abcdefgh1")
    'HF_TOKEN=*** python train.py --hub_token ***'
    """
    return SECRET.sub(_hide, command)


def _hide(match: re.Match[str]) -> str:
    return match[0].removesuffix(match["value"] or match[0]) + "***"


def _hide_in_command(record: "Result | TrainingRecord") -> None:
    if isinstance(record.command, str):
        object.__setattr__(record, "command", hide_secrets(record.command))


def find_private(folder: Path) -> list[str]:
    """What to tell about commands in the records of a folder before others read them."""
    warnings = []
    recorded = {RESULTS_FILE: read_results(folder), TRAINING_FILE: read_training(folder)}
    for name, records in recorded.items():
        path = Path(folder) / name
        if records and hide_secrets(text := path.read_text(encoding="utf-8")) != text:
            warnings.append(
                f"{path} holds what looks like a token or password. The card shows *** in its "
                f"place, but the file goes to the Hub with the folder: take it out."
            )
        commands = " ".join(record.command for record in records)
        if paths := sorted(set(ABSOLUTE.findall(commands))):
            warnings.append(
                f"Commands in {path} name places on this machine, which readers of the card will "
                f"see: {', '.join(paths[:3])}. Write them relative to the repository."
            )
    return warnings


Record = TypeVar("Record", Result, TrainingRecord)


def read_results(folder: Path) -> list[Result]:
    """The results beside the weights; none where nothing was measured."""
    return _read(Path(folder) / RESULTS_FILE, Result)


def write_results(results: Sequence[Result], folder: Path) -> None:
    """Save results beside the weights, in place of those that were there."""
    _write(results, Path(folder) / RESULTS_FILE)


def read_training(folder: Path) -> list[TrainingRecord]:
    """The stages of training in their order; none where nothing is recorded."""
    return _read(Path(folder) / TRAINING_FILE, TrainingRecord)


def write_training(stages: Sequence[TrainingRecord], folder: Path) -> None:
    """Save the stages of training beside the weights, in place of those that were there."""
    _write(stages, Path(folder) / TRAINING_FILE)


def to_model_index(results: Sequence[Result]) -> list[EvalResult]:
    """Results as the metadata of a card holds them."""
    return [
        EvalResult(
            task_type=one_line(result.task),
            dataset_type=one_line(result.dataset_id or result.dataset),
            dataset_name=one_line(result.dataset),
            dataset_split=one_line(result.split),
            dataset_revision=result.dataset_revision,
            metric_type=one_line(result.metric),
            metric_name=one_line(f"{result.metric} on {result.hardware}"),
            metric_value=result.value,
        )
        for result in results
    ]


def to_hub_files(results: Sequence[Result]) -> dict[str, str]:
    """Names and texts of the files for `.eval_results`: one for each setting.

    A setting is a dataset of the Hub, a split, a command and the hardware. Results on other
    datasets have no place there.
    """
    settings: dict[tuple, list[Result]] = {}
    for result in results:
        if result.dataset_id is not None:
            key = (result.dataset_id, result.dataset_revision, result.split)
            settings.setdefault((*key, result.command, result.hardware), []).append(result)
    texts: dict[str, str] = {}
    for of_setting in settings.values():
        stem = slug(f"{of_setting[0].dataset_id} {of_setting[0].split}")
        taken = sum(name.rpartition("_")[0] == stem for name in texts)
        entries = eval_result_entries_to_yaml([_to_entry(result) for result in of_setting])
        yaml = yaml_dump(entries, sort_keys=False)
        texts[f"{stem}_{taken + 1}.yaml"] = f"{HUB_RESULTS_MARKER}\n{yaml}"
    return texts


def write_hub_files(results: Sequence[Result], folder: Path) -> None:
    """Write `.eval_results` anew; files there that others wrote stay."""
    place = Path(folder) / HUB_RESULTS_FOLDER
    for path in place.glob("*.yaml"):
        if path.read_text(encoding="utf-8").startswith(HUB_RESULTS_MARKER):
            path.unlink()
    for name, text in to_hub_files(results).items():
        place.mkdir(exist_ok=True)
        (place / name).write_text(text, encoding="utf-8")


def one_line(text: str) -> str:
    """A text without line breaks and without characters that cannot be seen.

    >>> one_line(" two\\nlines\\x07 ")
    'two lines'
    """
    return " ".join("".join(letter if letter.isprintable() else " " for letter in text).split())


def slug(text: str) -> str:
    """A text as part of a file name.

    >>> slug("SA-Co/Gold: test")
    'sa-co-gold-test'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def _to_entry(result: Result) -> EvalResultEntry:
    setting = f"{result.metric}, {result.split} split, on {result.hardware}: {result.command}"
    return EvalResultEntry(
        dataset_id=one_line(result.dataset_id or ""),
        task_id=one_line(result.benchmark_task or slug(result.metric)),
        value=result.value,
        dataset_revision=result.dataset_revision,
        date=result.date,
        notes=one_line(setting),
    )


def _read(path: Path, kind: type[Record]) -> list[Record]:
    if not path.is_file():
        return []
    try:
        return [kind(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path} is no list of {kind.__name__}: {error}") from error


def _write(records: Sequence[Result] | Sequence[TrainingRecord], path: Path) -> None:
    text = json.dumps([asdict(record) for record in records], indent=2)
    path.write_text(f"{text}\n", encoding="utf-8")


def _check_texts(
    record: Result | TrainingRecord,
    optional: Sequence[str] = (),
    leave_out: Sequence[str] = (),
) -> None:
    for name in (entry.name for entry in fields(record)):
        value = getattr(record, name)
        if name in leave_out or (name in optional and value is None):
            continue
        if not isinstance(value, str) or not one_line(value):
            raise ValueError(f"{name}={value!r} says nothing: a result needs every field.")
