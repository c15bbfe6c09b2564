"""SA-V: videos with JSON, and folders of pictures."""

import io
import json
import tarfile
from fractions import Fraction

import av
import fsspec
import numpy as np
import pytest
from torch.utils.data import DataLoader

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.files import find
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.sav import SavFolders, SavVideos, write_sav_folders, write_sav_videos
from efficientsam3_hf.data.synthetic import Clips

COUNTS = [5, 2, 2, 2, 2, 2, 5]


@pytest.fixture(scope="module")
def clips() -> list:
    dataset = Clips(3, side=64, num_frames=18, annotate_every=4)
    return [dataset[index] for index in range(3)]


@pytest.fixture(scope="module")
def videos(tmp_path_factory, clips) -> str:
    folder = tmp_path_factory.mktemp("sav_train")
    write_sav_videos(clips, folder / "sav_000")
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, clips) -> str:
    folder = tmp_path_factory.mktemp("sav_val")
    write_sav_folders(clips, folder)
    return str(folder)


@pytest.fixture(scope="module")
def tars(tmp_path_factory, clips) -> str:
    folder = tmp_path_factory.mktemp("sav_tars")
    write_sav_videos(clips, folder, per_tar=2)
    return str(folder)


@pytest.fixture(scope="module")
def far_tars(tars) -> str:
    fsspec.filesystem("memory").put(tars + "/", "/sav_tars/", recursive=True)
    return "memory://sav_tars"


@pytest.fixture(scope="module")
def archive(tmp_path_factory, folders) -> str:
    """The tar of SA-V's "val" as it comes, less its pictures' number."""
    path = tmp_path_factory.mktemp("sav_archive") / "sav_val.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(folders, "sav_val")
    return f"tar://sav_val::{path}"


def difference(frames, expected) -> float:
    return np.abs(np.stack(frames).astype(int) - np.stack(expected)).mean()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("where", ["videos", "tars", "far_tars"])
def test_videos_that_are_written_are_read(request, clips, where: str, streaming: bool):
    folder = request.getfixturevalue(where)
    read = list(load(SavVideos(folder), streaming=streaming, on_error="raise"))

    for found, clip in zip(read, clips, strict=True):
        assert found.source_id == clip.source_id
        assert (found.num_frames, found.size, found.fps) == (18, (64, 64), 24.0)
        assert found.annotated_frames == [0, 4, 8, 12, 16]
        assert [m.rles for m in found.masklets] == [m.rles for m in clip.masklets]
        assert [m.source_id for m in found.masklets] == [m.source_id for m in clip.masklets]
        assert difference([frame.pixels for frame in found.video], clip.frames) < 12


def test_folders_that_are_written_are_read(folders, clips):
    read = list(load(SavFolders(folders), on_error="raise"))

    for found, clip in zip(read, clips, strict=True):
        assert found.annotated_frames == [0, 4, 8, 12, 16]
        assert [m.rles for m in found.masklets] == [m.rles for m in clip.masklets]
        assert [m.source_id for m in found.masklets] == ["000", "001", "002", "003"][
            : len(clip.masklets)
        ]
        assert found.frame_names[4] == "00004"
        assert difference([frame.pixels for frame in found.video], clip.frames) < 8


@pytest.mark.parametrize("kind", ["videos", "tars", "folders"])
def test_masks_of_a_cut_lie_on_what_they_are_of(request, clips, kind: str):
    reader = SavFolders if kind == "folders" else SavVideos
    samples = load(
        reader(request.getfixturevalue(kind), cut=Cut(6, place="random")), on_error="raise"
    )

    starts = set()
    for epoch in range(5):
        samples.set_epoch(epoch)
        for found, clip in zip(samples, clips, strict=True):
            start = found.frame_indices[0]
            starts.add(start)
            assert found.frame_indices == list(range(start, start + 6))
            assert difference(found.frames, clip.frames[start : start + 6]) < 12
            for masklet, original in zip(found.masklets, clip.masklets, strict=True):
                inside = [f for f in found.frame_indices if f in original.rles]
                assert masklet.rles == {frame: original.rles[frame] for frame in inside}
    assert starts == {0, 4, 8, 12}


def write_by_hand(folder, entries, frames: int = 9) -> None:
    """A video of 5 by 4 blocks of 16 pixels that get brighter, and its JSON."""
    folder.mkdir(exist_ok=True)
    with av.open(str(folder / "sav_000001.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 80, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 24)
        for number in range(frames):
            pixels = np.full((64, 80, 3), 20 + 20 * number, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    content = {
        "video_id": "sav_000001",
        "video_duration": frames / 24,
        "video_frame_count": float(frames),
        "video_height": 64,
        "video_width": 80,
        "video_resolution": 5120,
        "video_environment": "Indoor",
        "video_split": "train",
        "masklet": entries,
        "masklet_id": [0],
        "masklet_type": ["manual"],
        "masklet_num": 1,
    }
    (folder / "sav_000001_manual.json").write_text(json.dumps(content))


def run_lengths(first: int) -> dict:
    """The column number `first` of an image of 64 rows and 80 columns."""
    return {"size": [64, 80], "counts": [64 * first, 64, 64 * (79 - first)]}


def test_entry_j_of_the_documented_json_is_frame_4_j_of_the_video(tmp_path):
    empty = {"size": [64, 80], "counts": [64 * 80]}
    write_by_hand(tmp_path, [[run_lengths(3)], [empty], [run_lengths(5)]])

    (sample,) = load(SavVideos(str(tmp_path), cut=Cut(5, place="random")), on_error="raise")

    start = sample.frame_indices[0]
    assert start in (0, 4)
    for index, frame in zip(sample.frame_indices, sample.frames, strict=True):
        assert frame.mean() == pytest.approx(20 + 20 * index, abs=3)
    (masklet,) = sample.masklets
    assert masklet.details == {"masklet_type": "manual"}
    expected = {0: 3} if start == 0 else {8: 5}
    assert {
        frame: int(np.flatnonzero(decode(rle).all(0))[0]) for frame, rle in masklet.rles.items()
    } == expected


def decode(rle) -> np.ndarray:
    from efficientsam3_hf.data.masks_rle import decode_rle

    return decode_rle(rle)


def test_automatic_masklets_have_numbers_of_their_own(tmp_path):
    write_by_hand(tmp_path, [[run_lengths(3)], [run_lengths(4)], [run_lengths(5)]])
    text = (tmp_path / "sav_000001_manual.json").read_text()
    (tmp_path / "sav_000001_auto.json").write_text(text)

    (both,) = load(SavVideos(str(tmp_path), "both", pixels=False), on_error="raise")
    (auto,) = load(SavVideos(str(tmp_path), "auto", pixels=False), on_error="raise")

    assert [masklet.source_id for masklet in both.masklets] == [0, "a0"]
    assert [masklet.source_id for masklet in auto.masklets] == ["a0"]
    assert auto.video is None
    with pytest.raises(ValueError, match='"manual", "auto" or "both"'):
        SavVideos(str(tmp_path), "all")


def test_a_video_in_a_tar_can_be_gone_through_more_than_once_at_a_time(tars, clips):
    video = load(SavVideos(tars), on_error="raise")[0].video

    for first, second in zip(video, video, strict=True):
        np.testing.assert_array_equal(first.pixels, second.pixels)
    assert "train_000000" in str(video)


@pytest.mark.parametrize("far", [False, True])
def test_what_a_tar_lacks_is_left_out_or_listed(tmp_path, far: bool):
    rows = [[run_lengths(3)], [run_lengths(4)], [run_lengths(5)]]
    write_by_hand(tmp_path / "files", rows)
    text = (tmp_path / "files" / "sav_000001_manual.json").read_bytes()
    video = (tmp_path / "files" / "sav_000001.mp4").read_bytes()
    whole = {"sav_000001.mp4": video, "sav_000001_manual.json": text}
    members = {
        **whole,
        "sav_000001_auto.json": text,
        **{name.replace("01", "02"): data for name, data in whole.items()},
        "sav_000003.mp4": video,  # which nobody annotated
        "sav_000004_manual.json": text,
        "README.md": b"text",
    }
    with tarfile.open(tmp_path / "sav_000.tar", "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(f"sav_train/sav_000/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    folder = str(tmp_path)
    if far:
        filesystem = fsspec.filesystem("memory")
        filesystem.pipe("/sav_lacking/sav_000.tar", (tmp_path / "sav_000.tar").read_bytes())
        folder = "memory://sav_lacking"

    numbers = {}
    for masklets in ("manual", "auto", "both"):
        samples = load(SavVideos(folder, masklets), streaming=True)
        found = [[masklet.source_id for masklet in sample.masklets] for sample in samples]
        numbers[masklets] = found, list(samples.broken.listed())

    assert numbers == {
        "manual": ([[0], [0]], ["sav_000004"]),
        "auto": ([["a0"]], []),
        "both": ([[0, "a0"], [0]], ["sav_000004"]),
    }


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_and_workers_share_the_videos_of_tars_out(tmp_path, workers: int):
    dataset = Clips(7, side=32, num_frames=4, annotate_every=4)
    write_sav_videos((dataset[index] for index in range(7)), tmp_path, per_tar=2)

    seen = []
    for rank in range(2):
        stream = load(SavVideos(str(tmp_path), cut=Cut(2)), streaming=True, on_error="raise")
        part = stream.shuffle(seed=1, buffer_size=2).split(rank, 2)
        seen += [s.source_id for s in DataLoader(part, batch_size=None, num_workers=workers)]

    assert sorted(seen) == [f"train_{index:06d}" for index in range(7)]


def cut_video_short(folder):
    path = folder / "sav_000001.mp4"
    path.write_bytes(path.read_bytes()[:400])


def lose_video(folder):
    (folder / "sav_000001.mp4").unlink()


def add_annotations(folder):
    write_by_hand(folder, [[run_lengths(3)]] * 4)


def break_mask(folder):
    write_by_hand(folder, [[{"size": [64, 80], "counts": [7, 8]}]])


def claim_another_size(folder):
    path = folder / "sav_000001_manual.json"
    path.write_text(path.read_text().replace("64", "60"))


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_video_short, "cannot be read as a video"),
        (lose_video, "There is no sav_000001.mp4"),
        (add_annotations, "4 annotations at every 4th frame do not fit 9 frames"),
        (break_mask, "cover 15 of 5120"),
        (claim_another_size, "do not fit|pixels"),
    ],
)
def test_a_broken_video_is_skipped_and_listed(tmp_path, damage, reason: str):
    write_by_hand(tmp_path, [[run_lengths(3)], [run_lengths(4)], [run_lengths(5)]])
    damage(tmp_path)

    samples = load(SavVideos(str(tmp_path), cut=Cut(2)))

    assert list(samples) == []
    (found,) = samples.broken.listed().values()
    assert any(part in found for part in reason.split("|"))


def test_a_video_too_short_for_a_cut_is_listed(folders):
    samples = load(SavFolders(folders, cut=Cut(30)))

    assert list(samples) == []
    assert "too few for a cut of 30" in next(iter(samples.broken.listed().values()))
    with pytest.raises(ValueError, match="is no cut"):
        Cut(0)


def test_clips_with_other_annotations_cannot_be_written(tmp_path):
    clip = Clips(1, side=32, num_frames=6)[0]

    with pytest.raises(ValueError, match="every 4th from the first on"):
        write_sav_videos([clip], tmp_path)


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_videos_are_read_out_of_their_tar(archive, folders, workers):
    expected = load(SavFolders(folders, cut=Cut(4, 2)), on_error="raise")

    samples = load(SavFolders(archive, cut=Cut(4, 2)), on_error="raise")

    loader = DataLoader(samples, batch_size=None, num_workers=workers, collate_fn=as_it_is)
    for sample, other in zip(loader, expected, strict=True):
        assert sample.source_id == other.source_id
        assert sample.masklets == other.masklets
        assert np.array_equal(sample.frames, other.frames)


def as_it_is(sample):
    return sample


def test_each_process_opens_an_archive_itself(archive, monkeypatch):
    filesystem, _ = find(archive)
    assert find(archive)[0] is filesystem

    monkeypatch.setattr("efficientsam3_hf.data.files.os.getpid", lambda: -1)

    assert find(archive)[0] is not filesystem  # two would move the place in one file


def test_an_archive_is_not_searched(archive):
    with pytest.raises(ValueError, match="cannot be searched"):
        load(SavVideos(archive))
