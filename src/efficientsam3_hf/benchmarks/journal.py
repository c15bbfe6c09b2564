"""Outcomes on disk, in parts: a killed run goes on where it was, and processes share the work.

A part is a batch, which is the same whatever the number of processes; so are its numbers. Each is a
file of its own, there whole or not at all.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .tasks import Outcome

SETTINGS = "settings.json"


class Journal:
    """The parts of one run.

    Args:
        folder: To keep them in.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(folder)

    def begin(self, settings: Mapping[str, Any]) -> None:
        """Note what the run depends on, or raise if parts of another run are there."""
        path = self.folder / SETTINGS
        settings = json.loads(json.dumps(settings))
        if path.is_file():
            check_same(json.loads(path.read_text(encoding="utf-8")), settings, self.folder)
        else:
            write_whole(path, json.dumps(settings, indent=2))

    def missing(self, name: str, count: int) -> list[int]:
        """Parts of a subset that are still to be done.

        Args:
            name: Of the subset.
            count: How many parts it has.
        """
        return [part for part in range(count) if not self.path(name, part).is_file()]

    def write(self, name: str, part: int, outcomes: Sequence[Outcome]) -> None:
        """Keep a part."""
        text = json.dumps([asdict(outcome) for outcome in outcomes])
        write_whole(self.path(name, part), text)

    def read(self, name: str, count: int) -> list[Outcome]:
        """The outcomes of all parts, in the order of the dataset."""
        return [
            Outcome(**entry)
            for part in range(count)
            for entry in json.loads(self.path(name, part).read_text(encoding="utf-8"))
        ]

    def path(self, name: str, part: int) -> Path:
        """The file of a part."""
        return self.folder / "parts" / (name or "all") / f"{part:06d}.json"


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> None:
    """Raise for settings that differ from those of the parts that are there."""
    different = [
        f"  {name}: {before.get(name)!r} then, {now.get(name)!r} now"
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]
    if different:
        listing = "\n".join(different)
        raise ValueError(
            f"{folder} holds a run with other settings:\n{listing}\nGo on with the same, choose "
            "another --output, or pass --restart to throw that run away."
        )


def write_whole(path: Path, text: str) -> None:
    """Write a file that others see whole or not at all, whenever the process dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    with unfinished.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)
