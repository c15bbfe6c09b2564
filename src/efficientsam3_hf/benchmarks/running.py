"""A task from beginning to end: shared out among processes, kept in parts, summed up.

    accelerate launch --num_processes 4 -m efficientsam3_hf.cli evaluate --task concept ...

Each process takes every so-manieth batch; the first one joins what all have written.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from torch.utils.data import DataLoader, Dataset

from ..evaluation import bootstrap, report, units
from ..evaluation.report import Change, Measurement
from .journal import Journal, write_whole
from .loading import fingerprint
from .subsets import Subset
from .tasks import Outcome, Scores, Task
from .where import hardware, revision

# Of the draws of the bootstrap.
SEED = 0

# Nothing is exchanged while processes work, and the slowest may be far behind.
PATIENCE = timedelta(days=7)

Advance = Callable[[int], None]


@dataclass
class Run:
    """How to run a task.

    Args:
        model: Folder or Hub name.
        output: Folder for everything that is written.
        device: Where models run; "cuda" is each process's own.
        dtype: Of the weights.
        workers: Processes that read and decode, beside each that computes.
        command: That was typed, for the record.
        restart: Throw away what is there.
        draws: Of the bootstrap; None for the task's own.
    """

    model: str
    output: Path
    device: str = "cpu"
    dtype: str = "float32"
    workers: int = 0
    command: str = ""
    restart: bool = False
    draws: int | None = None


@dataclass
class Result:
    """What came of a task.

    Args:
        task: With its options.
        model: Folder or Hub name.
        measurements: All numbers; none where the dataset's truth is not public.
        headline: Those for the table.
        predictions: Files and folders to submit.
        skipped: Records that could not be read.
        folder: Where it all is.
        scores: Of each subset, to be drawn anew.
    """

    task: Task
    model: str
    measurements: list[Measurement]
    headline: list[Measurement]
    predictions: list[Path]
    skipped: list[str]
    folder: Path
    scores: list[Scores]


def run_task(
    task: Task, subsets: Sequence[Subset], run: Run, show: Callable[[int], Advance] | None = None
) -> Result | None:
    """Run a task, or what of it is missing, and sum it up; None in all processes but the first.

    Args:
        task: With its options.
        subsets: Opened.
        run: How.
        show: Takes the number of batches of this process and gives what counts them.
    """
    state = processes(run.device)
    device = str(state.device) if run.device == "cuda" else run.device
    folder = run.output / slug(short_name(run.model)) / slug(f"{task.name} {subsets[0].dataset}")
    journal = Journal(folder)
    if state.is_main_process:
        if run.restart and folder.exists():
            shutil.rmtree(folder)
        journal.begin(settings_of(task, subsets, run))
    state.wait_for_everyone()
    todo = [
        (subset, part)
        for subset in subsets
        for part in journal.missing(slug_of(subset), count_parts(task, subset))
    ]
    state.wait_for_everyone()  # before parts appear that others have not looked for yet
    mine = todo[state.process_index :: state.num_processes]
    if mine:
        advance = show(len(mine)) if show else lambda count: None
        run_parts(task, mine, journal, run, device, advance)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    return sum_up(task, subsets, journal, run, torch.device(device))


def processes(device: str) -> PartialState:
    """Which of the processes this one is; the only one, if nobody launched several."""
    return PartialState(cpu=device == "cpu", timeout=PATIENCE)


def run_parts(
    task: Task,
    parts: Sequence[tuple[Subset, int]],
    journal: Journal,
    run: Run,
    device: str,
    advance: Advance,
) -> None:
    """Put batches to the model and keep what comes of each."""
    loaded = task.load(run.model, device, run.dtype)
    loader = DataLoader(
        Batches(task, parts), batch_size=None, num_workers=run.workers, collate_fn=as_it_is
    )
    for (subset, part), (keys, samples) in zip(parts, loader, strict=True):
        good = [index for index, sample in enumerate(samples) if sample is not None]
        done = (
            task.run(
                loaded,
                subset,
                [keys[index] for index in good],
                [samples[index] for index in good],
                predictions_folder(journal.folder, subset),
            )
            if good
            else []
        )
        of_key = {outcome.key: outcome for outcome in done}
        outcomes = [of_key.get(key) or Outcome(key, was_skipped=True) for key in keys]
        journal.write(slug_of(subset), part, outcomes)
        advance(1)


class Batches(Dataset):
    """Names and samples of each batch; in a worker process, it is read there."""

    def __init__(self, task: Task, parts: Sequence[tuple[Subset, int]]):
        self.parts, self.reads_itself = parts, task.reads_itself
        self.size = samples_at_once(task)

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, index: int) -> tuple[list[str], list[Any]]:
        subset, part = self.parts[index]
        numbers = range(len(subset.samples))[part * self.size : (part + 1) * self.size]
        keys = subset.samples.select(numbers).names
        read = subset.samples.__getitem__
        if self.reads_itself:
            return keys, [partial(read, number) for number in numbers]
        return keys, [read(number) for number in numbers]


def as_it_is(batch: Any) -> Any:
    """No collation: sizes differ."""
    return batch


def samples_at_once(task: Task) -> int:
    """Images of a batch; videos go one by one."""
    return getattr(task, "samples_at_once", task.batch_size)


def count_parts(task: Task, subset: Subset) -> int:
    """Batches of a subset."""
    return -(-len(subset.samples) // samples_at_once(task))


def slug_of(subset: Subset) -> str:
    """Name of a subset in paths; empty where there is only one."""
    return slug(subset.name) if subset.name else ""


def short_name(model: str) -> str:
    """The last part of a folder's path; a Hub name as it is."""
    return Path(model).resolve().name if Path(model).is_dir() else model


def slug(text: str) -> str:
    """A text as a name of a folder.

    >>> slug("SA-Co/Gold: test")
    'sa-co-gold-test'
    """
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "unnamed"


def predictions_folder(folder: Path, subset: Subset) -> Path:
    """Where predictions of a subset go."""
    return folder / "predictions" / slug_of(subset)


def settings_of(task: Task, subsets: Sequence[Subset], run: Run) -> dict[str, Any]:
    """All that the numbers depend on, by names that a user understands."""
    rows = [(subset.name, *row.values()) for subset in subsets for row in subset.samples.table]
    truth = [path.read_bytes() for subset in subsets for path in subset.truth]
    return {
        "task": task.name,
        "model": run.model,
        "weights": fingerprint(run.model),
        "dtype": run.dtype,
        "device": run.device,
        "data": [str(subset.reader) for subset in subsets],
        "format": subsets[0].form,
        "split": subsets[0].split,
        "records": len(rows),
        "contents of records": digest_of([*(json.dumps(row).encode() for row in rows), *truth]),
        **task.settings(),
    }


def digest_of(contents: Iterable[bytes]) -> str:
    """A short text that changes when any of these does."""
    digest = hashlib.blake2b(digest_size=8)
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def sum_up(
    task: Task, subsets: Sequence[Subset], journal: Journal, run: Run, device: torch.device
) -> Result:
    """Join the parts: predictions, units, numbers with intervals."""
    folder = journal.folder
    scores: list[Scores] = []
    predictions: list[Path] = []
    skipped: list[str] = []
    for subset in subsets:
        outcomes = journal.read(slug_of(subset), count_parts(task, subset))
        skipped += [f"{subset.title}: {each.key}" for each in outcomes if each.was_skipped]
        if all(each.was_skipped for each in outcomes):
            raise ValueError(
                f"None of the {len(outcomes)} records of {subset.title} could be read. Mend the "
                "data, and pass --restart."
            )
        place = predictions_folder(folder, subset)
        written = task.write_predictions(subset, outcomes, place)
        if written is not None or place.is_dir():
            predictions.append(written or place)
        if task.can_score(outcomes):
            scores.append(task.score(subset, outcomes))
            if scores[-1].table is not None:
                name = "-".join(filter(None, ("units", slug_of(subset))))
                units.save(scores[-1].table, folder / f"{name}.npz")
    measurements: list[Measurement] = []
    if len(scores) == len(subsets):
        measurements = measure(task, subsets, scores, run, device)
    present = {result.metric for result in measurements}
    main = measurements[-1].dataset if measurements else ""
    headline = [
        result
        for name in task.metrics
        if name in present
        for result in measurements
        if result.metric == name and result.dataset == main
    ]
    result = Result(task, run.model, measurements, headline, predictions, skipped, folder, scores)
    report.write_json(measurements, folder / "results.json")
    table = report.markdown_table(headline, task.decimals) if headline else ""
    write_whole(folder / "results.md", table)
    return result


def measure(
    task: Task,
    subsets: Sequence[Subset],
    scores: Sequence[Scores],
    run: Run,
    device: torch.device,
) -> list[Measurement]:
    """Numbers of each subset and, if there are several, of their average, which comes last."""
    draws = task.draws if run.draws is None else run.draws
    template = Measurement(
        model=short_name(run.model),
        task=task.kind,
        dataset="",
        split=subsets[0].split,
        metric="",
        value=0.0,
        command=run.command,
        hardware=hardware(device),
        date=date.today().isoformat(),
        revision=revision(),
    )
    named = [(subset.title, [score]) for subset, score in zip(subsets, scores, strict=True)]
    if len(subsets) > 1:
        named.append((subsets[0].shown, list(scores)))
    results = []
    for title, some in named:
        groups = joined_groups(some)
        if draws:
            numbers = bootstrap.intervals(
                partial(summarize_together, task, some),
                len(groups),
                samples=draws,
                groups=groups,
                seed=SEED,
            )
        else:
            numbers = summarize_together(task, some, np.ones(len(groups)))
        entry = replace(template, dataset=title, units=len(groups))
        if draws:
            entry = replace(entry, draws=draws, seed=SEED)
        results += report.measurements(numbers, entry, scale=task.scale)
    return results


def compare(first: Result, second: Result, draws: int | None = None) -> list[Change]:
    """How far the headline of one result is from that of another on the same units.

    Args:
        first: To compare with.
        second: The other.
        draws: Of the bootstrap; None for the task's own.
    """
    task = first.task
    groups = joined_groups(first.scores)
    if groups != joined_groups(second.scores):  # a record was skipped in one of them
        return report.changes(first.headline, second.headline)
    paired = bootstrap.differences(
        partial(summarize_together, task, first.scores),
        partial(summarize_together, task, second.scores),
        len(groups),
        samples=task.draws if draws is None else draws,
        groups=groups,
        seed=SEED,
    )
    return report.changes(first.headline, second.headline, paired, task.scale)


def joined_groups(scores: Sequence[Scores]) -> list[str]:
    """The groups of all subsets, told apart."""
    return [f"{place}/{group}" for place, one in enumerate(scores) for group in one.groups]


def summarize_together(
    task: Task, scores: Sequence[Scores], weights: np.ndarray
) -> dict[str, float]:
    """Numbers of one subset, or the average over several."""
    ends = np.cumsum([len(score.groups) for score in scores])[:-1]
    parts = np.split(weights, ends)
    summaries = [score.summarize(part) for score, part in zip(scores, parts, strict=True)]
    return dict(summaries[0]) if len(summaries) == 1 else task.average(summaries)
