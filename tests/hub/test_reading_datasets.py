"""Datasets on the Hub, read at `hf://` by the real client without being fetched first."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfFileSystem
from torch.utils.data import DataLoader

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.coco import CocoImages
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.phrases import RecapCaptions, TextSample, write_captions
from efficientsam3_hf.data.sa1b import Sa1b
from efficientsam3_hf.data.saco import SacoImages
from efficientsam3_hf.data.sav import SavVideos
from efficientsam3_hf.data.synthetic_writer import write_synthetic
from efficientsam3_hf.data.video_folders import Davis2017

REPOSITORY = "owner/world"
ADDRESS = f"hf://datasets/{REPOSITORY}"


@pytest.fixture
def put(hub, tmp_path):
    """Puts a folder that a function has written into a dataset on the Hub."""
    HfFileSystem.clear_instance_cache()  # which knows another endpoint

    def put_folder(write) -> Path:
        folder = tmp_path / "written"
        write(folder)
        paths = [path for path in folder.rglob("*") if path.is_file()]
        files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
        hub.put(REPOSITORY, files)
        return folder

    yield put_folder
    HfFileSystem.clear_instance_cache()


def same(far, near) -> None:
    """Assert that samples are equal but for where their videos are."""
    far, near = list(far), list(near)
    assert len(far) == len(near) > 0
    for one, other in zip(far, near, strict=True):
        assert one.source_id == other.source_id
        assert one.queries == other.queries
        for name in ("image", "frames"):
            if hasattr(one, name):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["sa1b", "sa1b_tars"])
def test_sa1b(put, form: str, streaming: bool):
    folder = put(lambda folder: write_synthetic(folder, form, count=5, side=32))

    far = load(Sa1b(ADDRESS), streaming=streaming, on_error="raise")

    same(far, load(Sa1b(str(folder))))


def test_a_tar_is_streamed_once_from_beginning_to_end(put, hub):
    def write(folder) -> None:
        write_synthetic(folder, "sa1b_tars", count=5, side=32)
        with tarfile.open(folder / "sa_000000.tar", "a") as tar:
            member = tarfile.TarInfo("padding")
            member.size = 20_000_000
            tar.addfile(member, io.BytesIO(bytes(member.size)))

    put(write)
    stream = load(Sa1b(ADDRESS), streaming=True, on_error="raise")

    assert len(list(stream)) == 5

    reads = [path for method, path, _ in hub.requests if method == "GET" and "/bucket/" in path]
    assert len(reads) == 1


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", ["sav_videos", "sav_tars"])
def test_sa_v(put, form: str, streaming: bool):
    folder = put(lambda folder: write_synthetic(folder, form, count=3, side=32, num_frames=9))
    options = {"cut": Cut(5, place="start")}

    far = load(SavVideos(ADDRESS, **options), streaming=streaming, on_error="raise")

    same(far, load(SavVideos(str(folder), **options)))


def test_a_video_is_fetched_once_for_all_processes(put, hub):
    put(lambda folder: write_synthetic(folder, "sav_videos", count=2, side=32, num_frames=9))
    samples = load(SavVideos(ADDRESS, cut=Cut(5)), on_error="raise")

    for workers in (0, 1):
        assert len(list(DataLoader(samples, batch_size=None, num_workers=workers))) == 2

    reads = [path for method, path, _ in hub.requests if method == "GET" and "/bucket/" in path]
    assert len(reads) == 2


def test_coco_and_saco(put):
    folder = put(
        lambda folder: [
            write_synthetic(folder, "coco", split="val", count=3, side=32),
            write_synthetic(folder / "gold", "saco", split="test", count=3, side=32),
        ]
    )

    same(load(CocoImages(ADDRESS), on_error="raise"), load(CocoImages(str(folder))))
    name = "gold/gold_synthetic_merged_a_release_test.json"
    far = SacoImages(f"{ADDRESS}/{name}", f"{ADDRESS}/gold/images")
    near = SacoImages(str(folder / name), str(folder / "gold" / "images"))
    same(load(far, on_error="raise"), load(near))


def test_davis(put):
    folder = put(lambda folder: write_synthetic(folder, "davis2017", "val", count=2, side=32))
    cut = Cut(3, place="start")

    far = load(Davis2017(ADDRESS, cut=cut), on_error="raise")

    same(far, load(Davis2017(str(folder), cut=cut)))


def test_captions_are_streamed_by_worker_processes(put):
    texts = [TextSample(f"A picture of {number} dogs.", str(number)) for number in range(30)]
    put(lambda folder: write_captions(texts, folder, per_shard=10))

    stream = load(RecapCaptions(ADDRESS), streaming=True, on_error="raise")
    read = list(DataLoader(stream, batch_size=None, num_workers=2))

    assert sorted(read, key=lambda each: int(each.source_id)) == texts


def test_what_is_not_there_is_said(put):
    put(lambda folder: write_synthetic(folder, "sa1b", count=1, side=32))

    with pytest.raises(FileNotFoundError, match="nowhere"):
        load(CocoImages(f"{ADDRESS}/nowhere"))
