"""The table of the miniature's scores, and README with it.

python -m examples.miniature.report
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("results.json")
README = Path(__file__).parents[2] / "README.md"
START, END = "<!-- miniature -->", "<!-- /miniature -->"


def read_results(path: Path = RESULTS) -> dict[str, Any]:
    """What has been measured; nothing, if there is no file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def table(results: Mapping[str, Any]) -> str:
    """What is reported of models, as Markdown.

    >>> print(table({"reported": {"teacher": {"cgF1": 80.0}, "student": {"J&F": 75.25}}}))
    | | cgF1 | J&F |
    | --- | ---: | ---: |
    | teacher | 80.0 | – |
    | student | – | 75.2 |

    Args:
        results: With `reported`: model -> metric -> value in percent.
    """
    reported: Mapping[str, Mapping[str, Any]] = results.get("reported", {})
    if not reported:
        return "Nothing has been measured."
    metrics = list(dict.fromkeys(name for scores in reported.values() for name in scores))
    rows = [["", *metrics], ["---", *("---:" for _ in metrics)]]
    rows += [[name, *(shown(of.get(each)) for each in metrics)] for name, of in reported.items()]
    return "\n".join(f"| {' | '.join(row)} |".replace("|  |", "| |") for row in rows)


def shown(value: Any) -> str:
    """A number in percent, a count, or a word."""
    if isinstance(value, float):
        return f"{value:.1f}"
    return "–" if value is None else f"{value:,}" if isinstance(value, int) else str(value)


def with_table(text: str, results: Mapping[str, Any]) -> str:
    """A text whose block between the marks is the table."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"There is no block between {START} and {END} for the table.")
    return f"{before}{START}\n\n{table(results)}\n\n{END}{after}"


def main() -> None:
    text = with_table(README.read_text(encoding="utf-8"), read_results())
    README.write_text(text, encoding="utf-8")
    print(f"{README} has the scores of {RESULTS}.")


if __name__ == "__main__":
    main()
