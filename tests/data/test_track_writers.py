"""Tracks in files: read back by what others read them with."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco

from efficientsam3_hf.data.track_writers import DavisWriter, OverlayWriter, RleWriter
from efficientsam3_hf.data.video import open_video

HEIGHT, WIDTH = 30, 45


def frame(index: int, *objects: tuple[int, float, tuple[int, int, int, int]]) -> SimpleNamespace:
    """A result with a rectangle (x1, y1, x2, y2) for each (id, score, rectangle)."""
    masks = np.zeros((len(objects), HEIGHT, WIDTH), dtype=bool)
    for mask, (_, _, (x1, y1, x2, y2)) in zip(masks, objects, strict=True):
        mask[y1:y2, x1:x2] = True
    return SimpleNamespace(
        frame_index=index,
        object_ids=[number for number, *_ in objects],
        labels=["a “red” car" for _ in objects],
        scores=np.array([score for _, score, _ in objects]),
        boxes=np.array([box for *_, box in objects], dtype=float).reshape(-1, 4),
        masks=masks,
    )


FRAMES = [
    frame(0, (7, 0.9, (2, 3, 12, 13)), (9, 0.5, (8, 8, 20, 20))),
    frame(1),
    frame(2, (9, 0.25, (30, 0, 45, 30))),
]


@pytest.mark.parametrize("name", ["tracks.json", "tracks.jsonl"])
def test_rle_is_read_back_as_it_was(name: str, tmp_path):
    with RleWriter(tmp_path / "new" / name, video="street") as writer:
        for result in FRAMES:
            writer.write(result)

    text = (tmp_path / "new" / name).read_text(encoding="utf-8")
    records = json.loads(text) if name.endswith("json") else map(json.loads, text.splitlines())
    records = list(records)
    assert [(r["frame_index"], r["object_id"], r["score"]) for r in records] == [
        (0, 7, 0.9),
        (0, 9, 0.5),
        (2, 9, 0.25),
    ]
    assert {r["label"] for r in records} == {"a “red” car"}
    assert {r["video"] for r in records} == {"street"}
    assert records[0]["bbox"] == [2, 3, 10, 10]
    masks = [coco.decode(record["segmentation"]) for record in records]
    assert np.array_equal(np.stack(masks[:2]), FRAMES[0].masks)
    assert np.array_equal(masks[2], FRAMES[2].masks[0])


def test_a_list_without_objects_is_a_list(tmp_path):
    with RleWriter(tmp_path / "empty.json") as writer:
        writer.write(frame(0))

    assert json.loads((tmp_path / "empty.json").read_text()) == []


def test_lines_are_whole_at_any_time(tmp_path):
    writer = RleWriter(tmp_path / "tracks.jsonl")
    writer.write(FRAMES[0])

    lines = (tmp_path / "tracks.jsonl").read_text().splitlines()  # as after a kill

    assert [json.loads(line)["object_id"] for line in lines] == [7, 9]
    writer.close()
    writer.close()  # twice does no harm


LONG = [
    frame(index, *[(i, 0.5, (i, index, 20, 25)) for i in range(index % 3)]) for index in range(9)
]


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("torn", [0, 5, 40])
@pytest.mark.parametrize("again", [0, 3])
@pytest.mark.parametrize("name", ["tracks.json", "tracks.jsonl"])
def test_what_a_killed_process_wrote_is_gone_on_with(
    name: str, again: int, torn: int, order: int, tmp_path
):
    results = LONG[::order]
    with RleWriter(tmp_path / f"whole.{name}") as writer:
        for result in results:
            writer.write(result)
    killed = RleWriter(tmp_path / name)
    for result in results[:6]:
        killed.write(result)
    killed.file.close()  # without the end of a list
    if torn:  # in the middle of a record
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[:-torn])
        again = 3

    with RleWriter(tmp_path / name, append=True) as writer:
        for result in results[6 - again :]:  # the session was saved some frames before
            writer.write(result)

    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


@pytest.mark.parametrize("name", ["tracks.json", "tracks.jsonl"])
def test_a_file_that_was_finished_or_is_new_is_gone_on_with_too(name: str, tmp_path):
    for results in (LONG[:4], LONG[4:]):
        with RleWriter(tmp_path / name, append=True) as writer:
            for result in results:
                writer.write(result)
    with RleWriter(tmp_path / f"whole.{name}") as writer:
        for result in LONG:
            writer.write(result)

    assert (tmp_path / name).read_bytes() == (tmp_path / f"whole.{name}").read_bytes()


def test_what_is_no_file_of_tracks_is_not_appended_to(tmp_path):
    (tmp_path / "notes.jsonl").write_text("mine\n")

    with pytest.raises(ValueError, match="holds a line that is no track"):
        RleWriter(tmp_path / "notes.jsonl", append=True)
    assert (tmp_path / "notes.jsonl").read_text() == "mine\n"


@pytest.mark.parametrize("order", [1, -1])
def test_objects_keep_their_numbers_when_pngs_are_gone_on_with(order: int, tmp_path):
    ids = [(7,), (7, 9), (4,)]
    results = [
        frame(10 + order * index, *[(number, 0.9, (number, 0, 20, 9)) for number in numbers])
        for index, numbers in enumerate(ids)
    ]
    with DavisWriter(tmp_path / "whole") as writer:
        for result in results:
            writer.write(result)
    killed = DavisWriter(tmp_path / "killed")
    for result in results[:2]:
        killed.write(result)

    resumed = DavisWriter(tmp_path / "killed", append=True)
    resumed.write(results[2])

    assert resumed.numbers == writer.numbers
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()
    assert DavisWriter(tmp_path / "killed").numbers == {}


def test_davis_pngs_hold_the_numbers_of_objects(tmp_path):
    with DavisWriter(tmp_path / "masks") as writer:
        for result in FRAMES:
            writer.write(result)

    assert sorted(p.name for p in (tmp_path / "masks").iterdir()) == [
        "00000.png", "00001.png", "00002.png",
    ]  # fmt: skip
    first = Image.open(tmp_path / "masks" / "00000.png")
    pixels = np.array(first)
    assert first.mode == "P"
    assert first.getpalette()[:9] == [0, 0, 0, 128, 0, 0, 0, 128, 0]
    assert writer.numbers == {7: 1, 9: 2}
    assert np.array_equal(pixels == 1, FRAMES[0].masks[0])  # the surer one has the overlap
    assert np.array_equal(pixels == 2, FRAMES[0].masks[1] & ~FRAMES[0].masks[0])
    assert not np.array(Image.open(tmp_path / "masks" / "00001.png")).any()


def test_more_objects_than_a_png_holds_are_an_error(tmp_path):
    writer = DavisWriter(tmp_path)
    many = frame(0, *[(number, 0.5, (0, 0, 5, 5)) for number in range(256)])

    with pytest.raises(ValueError, match="holds 255 objects"):
        writer.write(many)


@pytest.mark.parametrize("name", ["overlay.mp4", "overlay.gif"])
def test_an_overlay_has_a_frame_for_each_result(name: str, tmp_path):
    pictures = [np.full((HEIGHT, WIDTH, 3), 100, dtype=np.uint8) for _ in FRAMES]

    with OverlayWriter(tmp_path / name, fps=10) as writer:
        for result, picture in zip(FRAMES, pictures, strict=True):
            writer.write(result, picture)

    frames = [each.pixels.astype(int) for each in open_video(tmp_path / name)]
    assert len(frames) == 3
    assert np.abs(frames[1][:HEIGHT, :WIDTH] - 100).max() < 12  # nothing there
    assert np.abs(frames[0][5:12, 4:10] - 100).max() > 40  # something here


@pytest.mark.parametrize("fps", [0.3, 12.5, 30000 / 1001])
def test_an_overlay_is_as_fast_as_asked(fps: float, tmp_path):
    picture = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)

    with OverlayWriter(tmp_path / "overlay.mp4", fps=fps) as writer:
        for result in FRAMES:
            writer.write(result, picture)

    assert open_video(tmp_path / "overlay.mp4").fps == pytest.approx(fps, rel=1e-6)
    with pytest.raises(ValueError, match="fps=0 is no number of frames a second"):
        OverlayWriter(tmp_path / "overlay.mp4", fps=0)


def test_an_overlay_without_its_picture_is_an_error(tmp_path):
    writer = OverlayWriter(tmp_path / "overlay.mp4")

    with pytest.raises(ValueError, match=r"writer.write\(result, image\)"):
        writer.write(FRAMES[0])
