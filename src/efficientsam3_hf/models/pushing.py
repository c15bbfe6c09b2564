"""The card of what is pushed, in place of transformers' form that nobody has filled in.

The package, where it is installed, adds to `CARD_WRITERS` what writes the card of a whole folder.
Remote code has no such writer, nor has what is no whole model; they get a card of a few lines.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD_FILE = "README.md"
LICENCE_FILE = "LICENSE"
MARKER = "<!-- Written by efficientsam3_hf. Take this line out to keep what you change. -->"
TAGS = ("efficientsam3", "sam3")

# Each gets a folder and the repository's name, and returns whether it wrote a card.
CARD_WRITERS: list[Callable[[Path, str], bool]] = []

SHORT_CARD = """
{marker}

# {name}

{article} `{kind}` of `efficientsam3_hf`, EfficientSAM3 for transformers. It loads with that
package, or by `trust_remote_code=True` with the code that lies here, which is under Apache-2.0.

Weights that derive from SAM 3 are under the
[SAM License](https://huggingface.co/facebook/sam3/blob/main/LICENSE) of Meta Platforms. Nothing
here records where such weights come from, or what they can do.
"""


class PushedCardMixin:
    """For models: what is pushed has a card that tells what it is."""

    _card_before: bytes | None = None

    def save_pretrained(self, save_directory: str | os.PathLike, *args, **kwargs) -> Any:
        """As in transformers; a card that is there stays, also with `push_to_hub=True`."""
        path = Path(save_directory) / CARD_FILE
        self._card_before = path.read_bytes() if path.is_file() else None
        try:
            return super().save_pretrained(  # pyright: ignore  of the class this is mixed into
                save_directory, *args, **kwargs
            )
        finally:
            self._card_before = None

    def _upload_modified_files(
        self, working_dir: str | os.PathLike, repo_id: str, files_timestamps: dict, **kwargs
    ) -> Any:
        """As in transformers, with card and licence."""
        path = Path(working_dir) / CARD_FILE
        if self._card_before is not None and is_form(path):
            path.write_bytes(self._card_before)
        if not is_own_card(path):
            tags = ModelCard.load(path).data.tags or [] if path.is_file() else []
            if any(write(path.parent, repo_id) for write in CARD_WRITERS):
                add_tags(path, tags)
            else:
                replace_form(path.parent, repo_id, type(self).__name__)
        timestamps = {file: time for file, time in files_timestamps.items() if file != LICENCE_FILE}
        return super()._upload_modified_files(  # pyright: ignore  of the class this is mixed into
            working_dir, repo_id, timestamps, **kwargs
        )


def is_form(path: Path) -> bool:
    """Whether a card is the one that transformers writes, with everything still to be filled in."""
    if not path.is_file():
        return False
    card = path.read_text(encoding="utf-8", errors="replace")
    form = ModelCard.from_template(ModelCardData(), model_description="@").text
    before, _, after = form.strip().partition("@")
    text = card.split("\n---\n", 1)[-1].strip()
    description = text.removeprefix(before).removesuffix(after)
    is_whole = len(text) == len(before) + len(description) + len(after)
    return is_whole and "automatically generated" in description and len(description) < 500


def is_own_card(path: Path) -> bool:
    """Whether there is a card that neither this package nor transformers wrote."""
    if not path.is_file() or MARKER.encode() in path.read_bytes():
        return False
    return not is_form(path)


def replace_form(folder: Path, repo_id: str, kind: str) -> None:
    """Put a card of a few lines where transformers left its form."""
    path = folder / CARD_FILE
    if not is_form(path):
        return
    tags = ModelCard.load(path).data.tags or []
    data = ModelCardData(library_name="transformers", tags=list(TAGS))
    article = "An" if kind[0] in "AEIOU" else "A"
    text = SHORT_CARD.format(marker=MARKER, name=repo_id.split("/")[-1], kind=kind, article=article)
    ModelCard(f"---\n{data}\n---\n{text}").save(path)
    add_tags(path, tags)


def add_tags(path: Path, tags: list[str]) -> None:
    """Add to a card what tags it lacks."""
    card = ModelCard.load(path)
    if missing := [tag for tag in tags if tag not in (card.data.tags or [])]:
        card.data.tags = [*(card.data.tags or []), *missing]
        card.save(path)
