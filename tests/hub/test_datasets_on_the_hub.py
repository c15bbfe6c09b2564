"""Datasets in a repository on the Hub: the same samples as from disk, through the same call."""

import numpy as np
import pytest
from huggingface_hub import HfApi, HfFileSystem

from efficientsam3_hf.data.clips import Cut
from efficientsam3_hf.data.coco import CocoImages
from efficientsam3_hf.data.loading import load
from efficientsam3_hf.data.sa1b import Sa1b
from efficientsam3_hf.data.sav import SavVideos
from efficientsam3_hf.data.synthetic_writer import write_synthetic

# huggingface_hub uploads files in a way that httpx will drop. Can go when it does not.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

FORMS = {
    "sa1b_tars": Sa1b,
    "coco": lambda folder: CocoImages(folder, "val2017", negatives="all"),
    "sav_videos": lambda folder: SavVideos(folder, cut=Cut(2)),
    "sav_tars": lambda folder: SavVideos(folder, cut=Cut(2)),
}


@pytest.fixture
def address(hub):
    """Put a folder on the Hub."""
    HfFileSystem.clear_instance_cache()

    def push(folder) -> str:
        api = HfApi(endpoint=hub.url, token="hf_owner")
        api.create_repo("owner/data", repo_type="dataset")
        api.upload_folder(repo_id="owner/data", folder_path=folder, repo_type="dataset")
        return "hf://datasets/owner/data"

    yield push
    HfFileSystem.clear_instance_cache()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", list(FORMS))
def test_samples_are_those_on_disk(form, streaming, address, tmp_path):
    write_synthetic(tmp_path, form, "val", count=2, side=32, num_frames=5)
    expected = list(load(FORMS[form](str(tmp_path)), on_error="raise"))

    far = list(load(FORMS[form](address(tmp_path)), streaming=streaming, on_error="raise"))

    assert len(far) == len(expected) == 2
    for found, sample in zip(far, expected, strict=True):
        assert (found.source_id, found.queries) == (sample.source_id, sample.queries)
        if form.startswith("sav"):
            assert np.array_equal(found.frames, sample.frames)
        else:
            assert np.array_equal(found.image, sample.image)
