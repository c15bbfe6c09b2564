"""Texts without images: lists of phrases, and the captions of Recap-DataComp-1B.

load(PhraseList("phrases.txt"))[0].text
load(RecapCaptions("hf://datasets/UCSC-VLAA/Recap-DataComp-1B", shards="*0001*"), streaming=True)
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .coco import phrase_of
from .files import read_bytes, write_json
from .loading import Reader, Record
from .parquet_shards import column_names, find_shards, iterate_rows, write_shards

# Columns of captions and of names, best first.
TEXT_COLUMNS = ("re_caption", "recaption", "text", "caption")
NAME_COLUMNS = ("key", "uid", "image_id", "sha256")


@dataclass
class TextSample:
    """A phrase or caption.

    Args:
        text: As it stands in the file.
        source_id: Its name or number there.
    """

    text: str
    source_id: str


class PhraseList(Reader[TextSample]):
    """Phrases of one file, each once.

    Args:
        path: A text file with a phrase in each line; or JSON: a list of phrases, an object with one
            as `text_annotations`, or the annotations of SA-Co, COCO or LVIS, of which the
            phrases or the names of the categories are taken.
    """

    def __init__(self, path: str):
        self.path = str(path)

    def __str__(self) -> str:
        return self.path

    def records(self) -> Iterator[tuple[str, Record]]:
        data = read_bytes(self.path).decode()
        texts = phrases_in(json.loads(data)) if self.path.endswith(".json") else data.splitlines()
        unique = dict.fromkeys(text.strip() for text in texts)
        for number, text in enumerate(text for text in unique if text):
            yield f"text_{number}", {"name": f"text_{number}", "text": text}

    def read(self, record: Record) -> TextSample:
        return TextSample(record["text"], record["name"])


def phrases_in(content: Any) -> list[str]:
    """Phrases of JSON in one of the known forms."""
    if isinstance(content, list):
        texts = content
    elif "text_annotations" in content:
        texts = content["text_annotations"]
    elif "video_np_pairs" in content:
        texts = [pair["noun_phrase"] for pair in content["video_np_pairs"]]
    elif content.get("images") and "text_input" in content["images"][0]:
        texts = [pair["text_input"] for pair in content["images"]]
    elif "categories" in content:
        texts = [phrase_of(category["name"]) for category in content["categories"]]
    else:
        raise ValueError(f"JSON with {sorted(content)[:5]} is no list of phrases of a known form.")
    strange = [text for text in texts if not isinstance(text, str)]
    if strange:
        raise ValueError(f"A list of phrases holds {strange[0]!r:.80}, which is no text.")
    return texts


class RecapCaptions(Reader[TextSample]):
    """Captions of Recap-DataComp-1B, or of other parquet files with a column of texts.

    Args:
        folder: Of the shards, or one of them. May be an address.
        shards: Which of them, as a pattern.
        column: Of the texts; by default the best of `re_caption`, `recaption`, `text`, `caption`.
    """

    def __init__(self, folder: str, shards: str = "*.parquet", column: str | None = None):
        self.folder, self.pattern, self.column = str(folder), shards, column

    def __str__(self) -> str:
        return self.folder

    def shards(self) -> list[str]:
        return find_shards(self.folder, self.pattern)

    def records(self) -> Iterator[tuple[str, Record]]:
        for shard in self.shards():
            yield from self.records_of_shard(shard)

    def records_of_shard(self, shard: str) -> Iterator[tuple[str, Record]]:
        names = column_names(shard)
        wanted = [self.column] if self.column else TEXT_COLUMNS
        text = next((name for name in wanted if name in names), None)
        if text is None:
            raise ValueError(f"{shard} has columns {names}, but none of {list(wanted)}.")
        key = next((name for name in NAME_COLUMNS if name in names), None)
        for number, row in enumerate(iterate_rows(shard, [text, key] if key else [text])):
            name = str(row[key]) if key else f"{Path(shard).stem}/{number}"
            yield name, {"name": name, "text": row[text]}

    def read(self, record: Record) -> TextSample:
        if not record["text"] or not record["text"].strip():
            raise ValueError("The caption is empty.")
        return TextSample(record["text"].strip(), record["name"])


def write_phrases(texts: Iterable[str], path: str | Path) -> None:
    """Write phrases: one in each line, or JSON with `text_annotations` if the name ends so."""
    path = Path(path)
    if path.suffix == ".json":
        write_json(path, {"info": {}, "text_annotations": list(texts)})
    else:
        path.write_text("".join(f"{text}\n" for text in texts))


def write_captions(
    samples: Iterable[TextSample], folder: str | Path, per_shard: int = 1000
) -> None:
    """Write texts in the form of Recap-DataComp-1B."""
    rows = [{"key": each.source_id, "re_caption": each.text} for each in samples]
    write_shards(rows, folder, "train", per_shard)
