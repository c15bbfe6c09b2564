"""`hf://` addresses of what is to be converted, through the real client."""

import io
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from conversion.reading import read_weights
from conversion.sources import find_donor, find_sources


def checkpoint(value: float) -> bytes:
    """A file as training writes it."""
    buffer = io.BytesIO()
    torch.save({"model": {"weight": torch.full((100_000,), value)}}, buffer)
    return buffer.getvalue()


@pytest.fixture
def files(hub) -> dict[str, bytes]:
    """What the repository `owner/released` holds."""
    files = {"stage1/a.pt": checkpoint(1), "stage1/b.pt": checkpoint(2), "README.md": b"# Weights"}
    hub.put("owner/released", files)
    return files


def test_a_file_is_fetched_and_read(files, hub):
    (source,) = find_sources("hf://owner/released/stage1/a.pt")

    assert (source.name, source.address) == ("a", "hf://owner/released/stage1/a.pt")
    assert source.path.read_bytes() == files["stage1/a.pt"]
    assert read_weights(source.path).weights["weight"][0] == 1
    hub.requests.clear()
    find_sources("hf://owner/released/stage1/a.pt")
    assert not hub.seen("GET", "/bucket/")  # it is kept


def test_a_folder_is_all_its_files(files):
    sources = find_sources("hf://owner/released/stage1")

    assert [source.name for source in sources] == ["a", "b"]
    assert [source.path.read_bytes() for source in sources] == [
        files["stage1/a.pt"],
        files["stage1/b.pt"],
    ]
    assert len(find_sources("hf://owner/released")) == 2


def test_a_revision_is_the_one_that_was_asked_for(files, hub):
    hub.repositories["owner/released"].tags["v1"] = hub.repositories["owner/released"].branches[
        "main"
    ]
    hub.put("owner/released", {"stage1/a.pt": checkpoint(3)})

    (old,) = find_sources("hf://owner/released@v1/stage1/a.pt")
    (new,) = find_sources("hf://owner/released/stage1/a.pt")

    assert old.path.read_bytes() == files["stage1/a.pt"]
    assert new.path.read_bytes() == checkpoint(3)
    assert old.address == "hf://owner/released@v1/stage1/a.pt"


def test_a_repository_of_transformers_is_one_source(hub, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    hub.put("owner/sam3", {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})

    donor = find_donor("hf://owner/sam3")

    assert {file.name for file in donor.path.iterdir()} == {"config.json", "model.safetensors"}
    assert len(read_weights(donor.path).weights) == len(model.state_dict())


def test_a_download_that_is_cut_off_is_completed(files, hub):
    hub.hang_up("GET", "/bucket/", after=1000)

    (source,) = find_sources("hf://owner/released/stage1/a.pt")

    assert source.path.read_bytes() == files["stage1/a.pt"]
    assert len(hub.seen("GET", "/bucket/")) == 2


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("hf://owner/absent/stage1/a.pt", "Repository Not Found"),
        ("hf://owner/absent", "Repository Not Found"),
        ("hf://owner/released/stage1/absent.pt", "Entry Not Found"),
        ("hf://owner/released@absent/stage1/a.pt", "Revision Not Found"),
        ("hf://owner/released@absent/stage1", "Revision Not Found"),
    ],
)
def test_what_is_not_there_is_named(address: str, reason: str, files):
    with pytest.raises(OSError, match=f"{address} could not be fetched: 404.*{reason}"):
        find_sources(address)


@pytest.mark.parametrize("address", ["hf://owner/released/stage1/a.pt", "hf://owner/released"])
def test_a_gated_repository_says_what_to_do(address: str, files, hub, monkeypatch):
    hub.repositories["owner/released"].gated = True
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(OSError, match="accept the terms on the Hub and run `hf auth login`"):
        find_sources(address)


@pytest.mark.parametrize("address", ["hf://owner/released/stage1/a.pt", "hf://owner/released"])
@pytest.mark.parametrize("trouble", ["error", "silence", "reset", "offline"])
def test_a_hub_out_of_reach_is_an_error_with_advice(
    trouble: str, address: str, files, hub, monkeypatch
):
    if trouble == "error":
        hub.fail("HEAD", ".", 500, times=99)
        hub.fail("GET", ".", 500, times=99)
    elif trouble == "silence":
        hub.hang_up("HEAD", ".", times=99)
        hub.hang_up("GET", ".", times=99)
    elif trouble == "reset":
        hub.hang_up("GET", ".", after=100, reset=True, times=99)
    else:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    with pytest.raises(OSError, match=f"{address} could not be fetched: .*Check the address"):
        find_sources(address)

    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.pt"))
