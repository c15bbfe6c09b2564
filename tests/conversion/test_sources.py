"""What a user may type as SOURCE."""

from pathlib import Path

import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from conversion import sources
from conversion.sources import find_donor, find_sources


class FakeHub:
    """A Hub repository, and a list of what was asked of it."""

    def __init__(self, monkeypatch, files: list[str], folder: Path):
        self.files, self.folder, self.asked = files, folder, []
        monkeypatch.setattr(sources, "hf_hub_download", self.download)
        monkeypatch.setattr(sources, "snapshot_download", self.snapshot)
        monkeypatch.setattr(sources, "HfApi", lambda: self)

    def list_repo_files(self, repo, revision=None):
        return self.files

    def download(self, repo, path, revision=None):
        self.asked.append((repo, path, revision))
        return str(self.folder / path)

    def snapshot(self, repo, revision=None, allow_patterns=None):
        self.asked.append((repo, None, revision))
        return str(self.folder)


def test_a_file_is_one_source(tmp_path):
    (tmp_path / "tinyvit.pt").touch()

    (source,) = find_sources(str(tmp_path / "tinyvit.pt"))

    assert (source.name, source.address) == ("tinyvit", "tinyvit.pt")


def test_a_folder_is_all_its_files(tmp_path):
    for name in ("b.pth", "a.pt", "c.safetensors", "notes.txt"):
        (tmp_path / name).touch()

    assert [source.name for source in find_sources(str(tmp_path))] == ["a", "b", "c"]


def test_a_folder_of_transformers_is_one_source(tmp_path):
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()

    (source,) = find_sources(str(tmp_path))

    assert source.path == tmp_path


def test_a_file_on_the_hub_is_fetched(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, [], tmp_path)

    (source,) = find_sources("hf://owner/repo@v1/stage1/tinyvit.pt")

    assert hub.asked == [("owner/repo", "stage1/tinyvit.pt", "v1")]
    assert source.address == "hf://owner/repo@v1/stage1/tinyvit.pt"
    assert source.name == "tinyvit"


def test_a_folder_on_the_hub_is_all_its_files(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, ["a/x.pt", "a/y.pt", "b/z.pt", "README.md"], tmp_path)

    found = find_sources("hf://owner/repo/a")

    assert [source.name for source in found] == ["x", "y"]
    assert len(hub.asked) == 2


def test_files_of_one_name_are_refused_before_anything_is_fetched(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, ["a/x.pt", "a/x.pth"], tmp_path)
    for name in ("m.pt", "m.pth"):
        (tmp_path / name).touch()

    with pytest.raises(ValueError, match=r"m\.pt and m\.pth would both be written to 'm'"):
        find_sources(str(tmp_path))
    with pytest.raises(ValueError, match=r"a/x\.pt and a/x\.pth would both"):
        find_sources("hf://owner/repo")
    assert hub.asked == []


def test_files_of_several_folders_on_the_hub_keep_their_folders_names(monkeypatch, tmp_path):
    FakeHub(monkeypatch, ["stage1/model.pt", "stage2/model.pt"], tmp_path)

    found = find_sources("hf://owner/repo")

    assert [source.name for source in found] == ["stage1-model", "stage2-model"]


def test_a_repository_of_released_files_may_have_a_configuration(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, ["config.json", "a.pt", "b.pt"], tmp_path)

    found = find_sources("hf://owner/repo")

    assert [source.name for source in found] == ["a", "b"]
    assert len(hub.asked) == 2


def test_a_pull_request_is_a_revision(monkeypatch, tmp_path):
    hub = FakeHub(monkeypatch, [], tmp_path)

    find_sources("hf://owner/repo@refs/pr/1/stage1/m.pt")

    assert hub.asked == [("owner/repo", "stage1/m.pt", "refs/pr/1")]


def test_a_repository_of_transformers_is_a_donor(monkeypatch, tmp_path):
    FakeHub(monkeypatch, ["config.json", "model.safetensors", "sam3.pt"], tmp_path)

    assert find_donor("hf://facebook/sam3").path == tmp_path


def test_several_files_are_no_donor(tmp_path):
    for name in ("a.pt", "b.pt"):
        (tmp_path / name).touch()

    with pytest.raises(ValueError, match=r"a\.pt, b\.pt"):
        find_donor(str(tmp_path))


@pytest.mark.parametrize("address", ["hf://owner", "hf://owner@v1/repo/file.pt", "hf://"])
def test_bad_addresses_are_explained(address):
    with pytest.raises(ValueError, match="hf://OWNER/REPOSITORY/PATH"):
        find_sources(address)


def test_what_is_not_there_is_named(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="absent"):
        find_sources(str(tmp_path / "absent.pt"))
    with pytest.raises(FileNotFoundError, match=r"holds no \.pt"):
        find_sources(str(tmp_path))
    FakeHub(monkeypatch, ["README.md"], tmp_path)
    with pytest.raises(FileNotFoundError, match=r"holds no \.pt"):
        find_sources("hf://owner/repo/a")


def test_a_hub_out_of_reach_is_an_error_with_advice(monkeypatch, tmp_path):
    def fail(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(sources, "hf_hub_download", fail)

    with pytest.raises(OSError, match="hf auth login"):
        find_sources("hf://owner/repo/file.pt")
