"""Checkpoints of a run: which of them were written to their end."""

import json
import logging
import os
from pathlib import Path

logger = logging.getLogger(__name__)

EXTRA_FILE = "stage_state.json"  # what a stage remembers besides
STATE_FILE = "trainer_state.json"  # what `Trainer` writes last into a checkpoint


def last_checkpoint(folder: str | os.PathLike | None) -> str | None:
    """The last checkpoint in a folder that was written whole; None if there is none."""
    if folder is None or not Path(folder).is_dir():
        return None
    numbered = []
    for path in Path(folder).glob("checkpoint-*"):
        number = path.name.rpartition("-")[2]
        if number.isdigit():
            numbered.append((int(number), path))
    for _, path in sorted(numbered, reverse=True):
        if is_whole(path):
            return str(path)
        logger.warning("%s was not written to its end: an earlier one is taken.", path)
    return None


def is_whole(checkpoint: Path) -> bool:
    """Whether `Trainer` came to the end of writing a checkpoint."""
    try:
        json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
