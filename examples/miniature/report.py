"""Tables and plots of what the miniature reaches, put into README and docs/miniature.md.

    python -m examples.miniature.report outputs/miniature
    python -m examples.miniature.report   # again, of what is in results.json

What `python -m examples.miniature` measured in a folder goes into `results.json` beside this file.
What it did not measure stays there if it is of the same teacher.
"""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from efficientsam3_hf.distillation.cache_files import write_json

from .plots import ablation_rows, draw_ablations, draw_stages
from .students import NO_DISTILLATION, ROUTE

RESULTS = Path(__file__).with_name("results.json")
ROOT = Path(__file__).parents[2]
README, DOCS = ROOT / "README.md", ROOT / "docs" / "miniature.md"
PICTURES = ROOT / "docs" / "images"

Results = Mapping[str, Any]
NOTHING = "Nothing has been measured."
GROUPS = ("stages", "seeds", "ablations", "ablation_seeds")  # of students


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """What has been measured; nothing, if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# Tables.


def table(results: Results) -> str:
    """Teacher and student, as Markdown.

    >>> teacher, student = ({"scores": {"cgF1": [each, 0.0, 99.0]}} for each in (80.0, 75.25))
    >>> print(table({"teacher": teacher, "stages": dict.fromkeys(ROUTE, student)}))
    | | cgF1 |
    | --- | ---: |
    | teacher | 80.0 |
    | student | 75.2 |
    """
    if not is_whole(results):
        return NOTHING
    metrics = list(results["teacher"]["scores"])
    entries = {"teacher": results["teacher"], "student": student_of(results)}
    rows = [
        [name, *(shown(value(entry, each)) for each in metrics)] for name, entry in entries.items()
    ]
    return markdown(["", *metrics], rows)


def is_whole(results: Results) -> bool:
    """Whether the student was measured after all stages."""
    return list(results.get("stages", {})) == list(ROUTE)


def student_of(results: Results) -> Results:
    """The student after all stages."""
    return list(results["stages"].values())[-1]


def stages(results: Results) -> str:
    """Teacher, and student after each stage, each number with half its interval of 95 %."""
    entries = {"teacher": results["teacher"], **results["stages"]} if results.get("stages") else {}
    metrics = list(results["teacher"]["scores"]) if entries else []
    rows = [
        [name, shown(entry.get("minutes")), *(with_interval(entry, each) for each in metrics)]
        for name, entry in entries.items()
    ]
    return markdown(["after stage", "minutes", *metrics], rows)


def aims(results: Results) -> str:
    """What was aimed at, and what was reached."""
    if not is_whole(results):
        return NOTHING
    teacher, student = results["teacher"], student_of(results)

    def share(stage: str, metric: str) -> float:
        return 100 * value(results["stages"][stage], metric) / value(teacher, metric)

    rows = [
        *(
            [f"teacher, {metric}", f"≥ {least}", value(teacher, metric)]
            for metric, least in (("cgF1", 75), ("IL_MCC", 90), ("box mIoU", 88), ("J&F", 80))
        ),
        ["student after all stages, share of the teacher's cgF1", "≥ 95", share("joint", "cgF1")],
        ["after prompts, share of box mIoU", "≥ 97", share("prompts", "box mIoU")],
        ["after prompts, share of click mIoU", "≥ 97", share("prompts", "click mIoU")],
        ["after memory, share of J&F", "≥ 95", share("memory", "J&F")],
        *gain_rows(results),
        ["student, phrases that name nothing, found", "≤ 2", value(student, "false positives")],
        [
            "FLOPs of trunk and necks, share of the teacher's",
            "≤ 20",
            100 * flops(student, 0) / flops(teacher, 0),
        ],
        *(
            [
                f"FLOPs with {words}, share of the teacher's",
                "",
                100 * flops(student, phrases) / flops(teacher, phrases),
            ]
            for phrases, words in ((1, "one phrase"), (4, "four phrases"))
        ),
    ]
    rows = [[shown(each) for each in row] for row in rows]
    return markdown(["in percent", "aim", "reached"], rows)


def gain_rows(results: Results) -> list[list[Any]]:
    """What distillation gives, where seeds and ablations were measured."""
    alone = results.get("ablations", {}).get(NO_DISTILLATION)
    if alone is None or len(results["ablation_seeds"]) < 2:
        return []
    of_seeds = over_seeds(results["ablation_seeds"])["cgF1"]
    gain = fmean(of_seeds) - value(alone, "cgF1")
    row = f"after a short training, cgF1 above that of “{NO_DISTILLATION}”"
    return [[row, f"> {stdev(of_seeds):.1f}", gain]]


def flops(entry: Results, phrases: int) -> float:
    """Of a picture and so many phrases."""
    return entry["cost"]["image"] + phrases * entry["cost"]["phrase"]


def seeds(results: Results) -> str:
    """The student's numbers over seeds."""
    found: Mapping[str, Results] = results.get("seeds", {})
    if len(found) < 2:
        return NOTHING
    rows = [
        [name, *(shown(each) for each in of), shown(fmean(of)), shown(stdev(of))]
        for name, of in over_seeds(found).items()
    ]
    return markdown(["", *(f"seed {name}" for name in found), "mean", "deviation"], rows)


def over_seeds(entries: Mapping[str, Results]) -> dict[str, list[float]]:
    """Metric -> numbers of all seeds."""
    metrics = next(iter(entries.values()))["scores"]
    return {name: [value(entry, name) for entry in entries.values()] for name in metrics}


def ablations(results: Results) -> str:
    """Students of a short training, with all of it and without a part."""
    entries = ablation_rows(results)
    metrics = list(results["teacher"]["scores"]) if entries else []
    rows = [
        [name, *(with_interval(entry, each) for each in metrics)] for name, entry in entries.items()
    ]
    return markdown(["", *metrics], rows)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose first column is words; a word in its place, if it has no rows."""
    if not rows:
        return NOTHING
    lines = [head, ["---", *("---:" for _ in head[1:])], *rows]
    return "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |") for line in lines)


def shown(number: Any) -> str:
    """A number in percent or a word."""
    if isinstance(number, float):
        return f"{number:.1f}"
    return "–" if number is None else str(number)


def value(entry: Results, metric: str) -> float:
    """A number of a model."""
    return entry["scores"][metric][0]


def with_interval(entry: Results, metric: str) -> str:
    """A number of a model, and how far it may be off."""
    number, low, high = entry["scores"][metric]
    return f"{number:.1f} ± {(high - low) / 2:.1f}"


# The texts that hold them.

BLOCKS: dict[Path, dict[str, Callable[[Results], str]]] = {
    README: {"miniature": table},
    DOCS: {"aims": aims, "stages": stages, "seeds": seeds, "ablations": ablations},
}


def with_table(text: str, name: str, content: str) -> str:
    """A text whose block between the marks of a name is a table."""
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, has_start, rest = text.partition(start)
    _, has_end, after = rest.partition(end)
    if not (has_start and has_end):
        raise ValueError(f"There is no block between {start} and {end} for the table.")
    return f"{before}{start}\n\n{content}\n\n{end}{after}"


def with_tables(path: Path, results: Results) -> str:
    """The text of a file with all its tables."""
    text = path.read_text(encoding="utf-8")
    for name, make in BLOCKS[path].items():
        text = with_table(text, name, make(results))
    return text


def publish(folder: Path) -> None:
    """Take over what was measured in the folder of a miniature."""
    found = read_results(folder / RESULTS.name)
    if not found:
        raise FileNotFoundError(
            f"Nothing was measured in {folder}: it has no {RESULTS.name}, which "
            "`python -m examples.miniature` writes."
        )
    write_json(RESULTS, joined(read_results(RESULTS), found))


def joined(old: Results, new: Results) -> dict[str, Any]:
    """New results, with those old ones of the same teacher that were not measured again.

    >>> teacher = {"teacher": {"weights": "a"}}
    >>> joined({**teacher, "seeds": {"0": 1, "1": 2}}, {**teacher, "seeds": {"1": 3}})["seeds"]
    {'0': 1, '1': 3}
    """
    whole = {**new, **{name: of for name, of in old.items() if name == "shipped"}}
    if old.get("teacher", {}).get("weights") != new["teacher"]["weights"]:
        return whole
    whole["teacher"] = {**old["teacher"], **new["teacher"]}
    if new["teacher"].get("minutes") is None:  # it was given
        whole["teacher"]["minutes"] = old["teacher"].get("minutes")
    for name in GROUPS:
        whole[name] = {**old.get(name, {}), **new.get(name, {})}
    return whole


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of a miniature that was measured")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        publish(options.folder)
    results = read_results()
    for path in BLOCKS:
        path.write_text(with_tables(path, results), encoding="utf-8")
        print(f"{path} has the tables of {RESULTS.name}.")
    PICTURES.mkdir(exist_ok=True)
    if results.get("stages"):
        draw_stages(results, PICTURES / "miniature_stages.png")
    if len(results.get("ablation_seeds", {})) > 1:
        draw_ablations(results, PICTURES / "miniature_ablations.png")


if __name__ == "__main__":
    main()
