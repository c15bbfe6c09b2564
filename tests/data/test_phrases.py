"""Phrases and captions."""

import json

import pytest

from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.phrases import (
    PhraseList,
    RecapCaptions,
    TextSample,
    write_captions,
    write_phrases,
)


def texts(samples) -> list[str]:
    return [sample.text for sample in samples]


@pytest.mark.parametrize("name", ["phrases.txt", "phrases.json"])
def test_phrases_that_are_written_are_read_once_each(tmp_path, name: str):
    write_phrases(["a dog", "zwei Hunde", "a dog", "  ", " red car "], tmp_path / name)

    samples = load(PhraseList(str(tmp_path / name)), on_error="raise")

    assert texts(samples) == ["a dog", "zwei Hunde", "red car"]
    assert samples[2].source_id == "text_2"


@pytest.mark.parametrize(
    "content",
    [
        ["a dog", "a cat"],
        {"info": {}, "text_annotations": ["a dog", "a cat"]},
        {"video_np_pairs": [{"noun_phrase": "a dog"}, {"noun_phrase": "a cat"}], "videos": []},
        {"images": [{"text_input": "a dog"}, {"text_input": "a cat"}], "categories": []},
        {"images": [{"id": 1}], "categories": [{"name": "a_dog"}, {"name": "a cat"}]},
    ],
)
def test_phrases_are_found_in_json_of_every_known_form(tmp_path, content):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(content))

    assert texts(load(PhraseList(str(path)))) == ["a dog", "a cat"]


@pytest.mark.parametrize(
    ("content", "message"), [({"words": []}, "no list of phrases"), ([1], "holds 1")]
)
def test_other_json_is_an_error(tmp_path, content, message: str):
    path = tmp_path / "phrases.json"
    path.write_text(json.dumps(content))

    with pytest.raises(ValueError, match=message):
        load(PhraseList(str(path)))


@pytest.mark.parametrize("streaming", [False, True])
def test_captions_that_are_written_are_read(tmp_path, streaming: bool):
    captions = [TextSample(f"A picture of {number} dogs.", f"k{number}") for number in range(700)]
    write_captions(captions, tmp_path / "data" / "train_data", per_shard=300)

    samples = load(RecapCaptions(str(tmp_path)), streaming=streaming, on_error="raise")

    assert list(samples) == captions


def test_captions_take_the_best_column(tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = {"url": ["u", "v"], "org_caption": ["old", "older"], "re_caption": ["new", " "]}
    parquet.write_table(pyarrow.table({**rows, "sha256": ["s1", "s2"]}), tmp_path / "a.parquet")

    samples = load(RecapCaptions(str(tmp_path)))

    assert list(samples) == [TextSample("new", "s1")]
    assert samples.broken.listed() == {"s2": "ValueError: The caption is empty"}
    original = load(RecapCaptions(str(tmp_path / "a.parquet"), column="org_caption"))
    assert texts(original) == ["old", "older"]
    with pytest.raises(ValueError, match=r"none of \['words'\]"):
        load(RecapCaptions(str(tmp_path), column="words"))


def test_captions_may_lie_at_an_address(tmp_path):
    import fsspec

    captions = [TextSample(f"text {number}", f"k{number}") for number in range(5)]
    write_captions(captions, tmp_path, per_shard=2)
    fsspec.filesystem("memory").put(str(tmp_path) + "/", "/captions/", recursive=True)

    stream = load(RecapCaptions("memory://captions"), streaming=True, on_error="raise")

    assert list(stream) == captions
