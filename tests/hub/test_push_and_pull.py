"""All that is saved goes to the Hub and comes back; what goes wrong on the way is said."""

import hashlib
import json
from importlib.resources import files as files_of
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from tiny import tiny_config, tiny_model, tiny_tracker
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    AutoTokenizer,
    CLIPTokenizer,
)

from efficientsam3_hf import (
    EfficientSam3Config,
    EfficientSam3ImageProcessor,
    EfficientSam3Model,
    EfficientSam3Processor,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerProcessor,
    zoo,
)
from efficientsam3_hf.hub.model_card import is_own_card, write_model_card
from efficientsam3_hf.models.auto_map import copy_code

# The client hands files to its HTTP library in the older way, which that library warns of. Can go
# when huggingface_hub passes `content=`.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

MODELS = {
    "concept": lambda: tiny_model(),
    "tracker": lambda: tiny_tracker(),
    "vision": lambda: tiny_model().vision_encoder,
    "backbone": lambda: tiny_model().vision_encoder.backbone,
    "text": lambda: tiny_model().text_encoder,
}
CONFIGURATIONS = {
    "concept": lambda: tiny_config(),
    "tracker": lambda: tiny_config().tracker_config,
    "vision": lambda: tiny_config().vision_config,
    "backbone": lambda: tiny_config().vision_config.backbone_config,
    "text": lambda: tiny_config().text_config,
}


@pytest.fixture(scope="module")
def code(tmp_path_factory) -> dict[str, bytes]:
    """What every repository has to hold."""
    return {file.name: file.read_bytes() for file in copy_code(tmp_path_factory.mktemp("code"))}


def assert_same_weights(model: torch.nn.Module, expected: torch.nn.Module) -> None:
    state, wanted = model.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)


@pytest.mark.parametrize("kind", MODELS)
def test_every_model_comes_back_as_it_was_sent(kind: str, hub, code):
    model = MODELS[kind]()

    model.push_to_hub("owner/model")

    files = hub.files("owner/model")
    assert {"config.json", "model.safetensors", "README.md"} < files.keys()
    assert code.items() <= files.items()
    for auto_class in (type(model), AutoModel):
        pulled = auto_class.from_pretrained("owner/model")
        assert type(pulled) is type(model)
        assert_same_weights(pulled, model)
    if kind == "tracker":
        assert type(AutoModelForMaskGeneration.from_pretrained("owner/model")) is type(model)


@pytest.mark.parametrize("kind", CONFIGURATIONS)
def test_every_configuration_comes_back_as_it_was_sent(kind: str, hub, code):
    config = CONFIGURATIONS[kind]()

    config.push_to_hub("owner/configuration")

    assert code.items() <= hub.files("owner/configuration").items()
    for auto_class in (type(config), AutoConfig):
        pulled = auto_class.from_pretrained("owner/configuration")
        assert type(pulled) is type(config)
        assert pulled.to_diff_dict() == config.to_diff_dict()


@pytest.mark.parametrize("kind", [EfficientSam3Processor, EfficientSam3TrackerProcessor])
def test_every_processor_comes_back_as_it_was_sent(kind: type, hub, code, processor):
    if kind is EfficientSam3TrackerProcessor:
        processor = EfficientSam3TrackerProcessor(processor.image_processor)

    processor.push_to_hub("owner/processor")

    assert code.items() <= hub.files("owner/processor").items()
    for auto_class in (kind, AutoProcessor):
        pulled = auto_class.from_pretrained("owner/processor")
        assert type(pulled) is kind
        assert pulled.to_dict() == processor.to_dict()
    assert type(AutoImageProcessor.from_pretrained("owner/processor")) is type(
        processor.image_processor
    )


def test_image_processor_and_tokenizer_come_back_as_they_were_sent(hub, code, processor):
    processor.image_processor.push_to_hub("owner/image_processor")
    processor.tokenizer.push_to_hub("owner/tokenizer")

    assert code.items() <= hub.files("owner/image_processor").items()
    for auto_class in (EfficientSam3ImageProcessor, AutoImageProcessor):
        pulled = auto_class.from_pretrained("owner/image_processor")
        assert type(pulled) is EfficientSam3ImageProcessor
        assert pulled.to_dict() == processor.image_processor.to_dict()
    for auto_class in (CLIPTokenizer, AutoTokenizer):
        pulled = auto_class.from_pretrained("owner/tokenizer")
        assert pulled("a red car") == processor.tokenizer("a red car")
        assert pulled.model_max_length == processor.tokenizer.model_max_length


def test_one_repository_serves_concept_model_and_tracker(
    hub, model, joint_tracker, tmp_path, processor
):
    zoo.save(model.config, tmp_path / "joint", model, joint_tracker)
    HfApi().create_repo("owner/joint")

    HfApi().upload_folder(repo_id="owner/joint", folder_path=tmp_path / "joint")

    assert_same_weights(EfficientSam3Model.from_pretrained("owner/joint"), model)
    assert_same_weights(AutoModel.from_pretrained("owner/joint"), model)
    for auto_class in (EfficientSam3TrackerModel, AutoModelForMaskGeneration):
        assert_same_weights(auto_class.from_pretrained("owner/joint"), joint_tracker)
    assert type(AutoProcessor.from_pretrained("owner/joint")) is type(processor)
    assert EfficientSam3TrackerProcessor.from_pretrained("owner/joint").image_processor.size == {
        "height": 112,
        "width": 112,
    }


@pytest.mark.parametrize("kind", ["model", "configuration", "processor"])
def test_saving_and_pushing_at_once_sends_all(kind: str, hub, code, model, processor, tmp_path):
    saved = {"model": model, "configuration": model.config, "processor": processor}[kind]
    saved.save_pretrained(tmp_path / "folder")  # as before; what has not changed must be sent, too

    saved.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="owner/at_once")

    assert code.items() <= hub.files("owner/at_once").items()


def test_a_large_model_is_sent_and_fetched_in_shards(hub, model):
    model.push_to_hub("owner/shards", max_shard_size="1MB")

    files = hub.files("owner/shards")
    assert "model.safetensors.index.json" in files
    assert sum(name.endswith(".safetensors") for name in files) > 3
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/shards"), model)


def test_branches_tags_and_commits_are_revisions(hub, new_model):
    def change() -> None:
        with torch.no_grad():
            new_model.text_projection.bias += 1

    first = new_model.push_to_hub("owner/revisions").oid
    HfApi().create_tag("owner/revisions", tag="v1")
    change()
    new_model.push_to_hub("owner/revisions", revision="try/louder")
    change()
    new_model.push_to_hub("owner/revisions")

    biases = {
        revision: EfficientSam3Model.from_pretrained(
            "owner/revisions", revision=revision
        ).text_projection.bias.mean()
        for revision in ("v1", first, "try/louder", "main")
    }
    newest = new_model.text_projection.bias.mean()
    assert torch.allclose(torch.stack(list(biases.values())), newest - torch.tensor([2, 2, 1, 0]))
    refs = HfApi().list_repo_refs("owner/revisions")
    assert {branch.name for branch in refs.branches} == {"main", "try/louder"}
    with pytest.raises(OSError, match="v2 is not a valid git identifier"):
        EfficientSam3Model.from_pretrained("owner/revisions", revision="v2")


def test_what_has_not_changed_is_not_sent_again(hub, model):
    first = model.push_to_hub("owner/same")
    uploads = len(hub.seen("PUT", "/bucket/"))

    second = model.push_to_hub("owner/same")

    assert second.oid == first.oid
    assert len(hub.seen("PUT", "/bucket/")) == uploads


def test_a_card_that_is_there_stays_there(hub, model):
    hub.put("owner/with_card", {"README.md": b"---\ntags: [mine]\n---\n# Mine\n"})

    model.push_to_hub("owner/with_card")

    assert hub.files("owner/with_card")["README.md"].endswith(b"# Mine\n")


@pytest.mark.parametrize("loaded", [EfficientSam3Model, AutoModel, AutoConfig, AutoProcessor])
def test_a_private_repository_asks_for_a_token_and_is_named(
    loaded: type, hub, model, processor, monkeypatch
):
    model.push_to_hub("owner/private", private=True)
    processor.push_to_hub("owner/private")
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(
        OSError, match=r"(?s)owner/private.*private repository.*`token=<your_token>`"
    ):
        loaded.from_pretrained("owner/private")

    options = {"token": "hf_reader"}
    if loaded is EfficientSam3Model:  # transformers 5.20 drops the token of a class other than Auto
        monkeypatch.setenv("HF_TOKEN", options.pop("token"))
    assert loaded.from_pretrained("owner/private", **options) is not None


def test_a_gated_repository_says_where_to_ask(hub, model, monkeypatch):
    model.push_to_hub("owner/gated")
    hub.repositories["owner/gated"].gated = True
    monkeypatch.delenv("HF_TOKEN")

    with pytest.raises(OSError, match=r"(?s)gated repo.*owner/gated"):
        EfficientSam3Model.from_pretrained("owner/gated")


def test_a_repository_or_file_that_is_not_there_is_named(hub, processor):
    with pytest.raises(OSError, match="owner/nothing is not a local folder and is not a valid"):
        EfficientSam3Model.from_pretrained("owner/nothing")

    processor.push_to_hub("owner/processor_only")
    with pytest.raises(OSError, match="owner/processor_only does not appear to have a file named"):
        EfficientSam3Model.from_pretrained("owner/processor_only", config=tiny_config())


def test_pushing_without_the_right_to_is_an_error(hub, model, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    with pytest.raises(HfHubHTTPError, match="403 Forbidden"):
        model.push_to_hub("owner/forbidden")

    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HfHubHTTPError, match="401"):
        model.push_to_hub("owner/forbidden")

    assert "owner/forbidden" not in hub.repositories


def test_the_loopback_hub_keeps_its_own_promises(hub):
    first = hub.put("owner/promises", {"a/x.txt": b"x", "a/b/y.bin": b"yy", "z.txt": b"zzz"})
    api = HfApi()

    assert {
        file.path: file.size for file in api.get_paths_info("owner/promises", ["z.txt", "no"])
    } == {"z.txt": 3}
    assert {entry.path for entry in api.list_repo_tree("owner/promises", "a")} == {"a/x.txt", "a/b"}
    (large,) = api.get_paths_info("owner/promises", ["a/b/y.bin"])
    assert large.lfs.sha256 == hashlib.sha256(b"yy").hexdigest()
    assert api.whoami()["name"] == "owner"
    second = api.delete_folder("a", "owner/promises").oid
    assert set(hub.files("owner/promises")) == {".gitattributes", "z.txt"}
    assert set(api.list_repo_files("owner/promises", revision=first)) >= {"a/x.txt", "a/b/y.bin"}
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.delete_file("z.txt", "owner/promises", parent_commit=first)
    assert api.model_info("owner/promises").sha == second
    with pytest.raises(HfHubHTTPError, match="404"):
        api.model_info("owner/other")


# Cards


@pytest.mark.parametrize("kind", ["concept", "tracker"])
def test_a_pushed_model_has_a_card_that_tells_what_it_is(kind: str, hub):
    model = MODELS[kind]()
    model.add_model_tags("mine")

    model.push_to_hub("owner/carded")

    files = hub.files("owner/carded")
    card = ModelCard(files["README.md"].decode())
    assert "# carded" in card.text
    assert type(model).__name__ in card.text
    assert "Model ID" not in card.text
    assert {"efficientsam3", "mine"} <= set(card.data.tags)
    assert (
        files["LICENSE"] == (files_of("efficientsam3_hf") / "assets/SAM_LICENSE.txt").read_bytes()
    )


@pytest.mark.parametrize("kind", ["vision", "configuration", "processor"])
def test_parts_have_a_short_card(kind: str, hub, model, processor):
    pushed = {"vision": model.vision_encoder, "configuration": model.config, "processor": processor}

    pushed[kind].push_to_hub("owner/part")

    card = ModelCard(hub.files("owner/part")["README.md"].decode())
    assert f"An `{type(pushed[kind]).__name__}` of `efficientsam3_hf`" in card.text
    assert "SAM License" in card.text
    assert card.data.library_name == "transformers"


def test_a_model_completes_the_card_of_its_processor_and_not_the_other_way_round(
    hub, model, processor
):
    processor.push_to_hub("owner/both")
    model.push_to_hub("owner/both")
    card = hub.files("owner/both")["README.md"]
    processor.push_to_hub("owner/both")

    assert b"## Quick start" in card
    assert hub.files("owner/both")["README.md"] == card


def test_saving_and_pushing_at_once_keeps_cards(hub, model, tmp_path):
    for name in ("written", "own"):
        zoo.save(model.config, tmp_path / name, model)
    (tmp_path / "own" / "README.md").write_text("# Modèle\n", encoding="utf-8")

    for name in ("written", "own"):
        model.save_pretrained(tmp_path / name, push_to_hub=True, repo_id=f"owner/{name}")

    assert hub.files("owner/own")["README.md"].decode() == "# Modèle\n"
    assert b"## Quick start" in hub.files("owner/written")["README.md"]
    assert {"LICENSE", "README.md"} <= hub.files("owner/written").keys()
    write_model_card(tmp_path / "written", name="anew")  # it is still the package's own
    assert "# anew" in (tmp_path / "written" / "README.md").read_text()


def test_a_form_that_was_filled_in_is_a_card_of_ones_own(tmp_path):
    form = ModelCard.from_template(
        ModelCardData(library_name="transformers"),
        model_description="This model card has been automatically generated.",
    )
    path = tmp_path / "README.md"
    form.save(path)
    assert not is_own_card(path)

    path.write_text(path.read_text().replace("## Uses", "## Uses\n\nFor counting cars."))

    assert is_own_card(path)


@pytest.mark.parametrize("kind", ["model", "configuration", "processor"])
def test_a_users_own_code_is_not_pushed(kind: str, hub, model, processor, tmp_path):
    saved = {"model": model, "configuration": model.config, "processor": processor}[kind]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.py").write_text("SECRET = 1\n")

    saved.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="owner/own_code")

    assert "train.py" not in hub.files("owner/own_code")
    assert "remote_code.py" in hub.files("owner/own_code")


# What goes wrong on the way up


def test_a_hub_that_stumbles_is_asked_again(hub, model):
    hub.fail("POST", "/preupload/", 500)
    hub.fail("PUT", "/bucket/", 503, times=2)

    model.push_to_hub("owner/stumbles")

    assert len(hub.seen("PUT", "/bucket/")) == 3
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/stumbles"), model)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_an_upload_that_is_cut_off_is_sent_again(reset: bool, hub, model):
    hub.hang_up("PUT", "/bucket/", after=300_000, reset=reset, times=2)

    model.push_to_hub("owner/cut_off")

    assert len(hub.seen("PUT", "/bucket/")) == 3
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/cut_off"), model)


@pytest.mark.parametrize("step", ["preupload", "batch", "upload", "verify", "commit", "answer"])
def test_an_upload_that_fails_is_an_error_and_leaves_the_repository_as_it_was(
    step: str, hub, new_model
):
    first = new_model.push_to_hub("owner/unlucky").oid
    before = hub.files("owner/unlucky")
    with torch.no_grad():
        new_model.text_projection.bias += 1
    faults = {
        "preupload": ("POST", "/preupload/"),
        "batch": ("POST", "/objects/batch"),
        "upload": ("PUT", "/bucket/"),
        "verify": ("POST", "/lfs/verify"),
        "commit": ("POST", "/commit/"),
        "answer": ("POST", "/commit/"),
    }
    hub.hang_up(
        *faults[step], after=1000 if step == "upload" else 0, work=step == "answer", times=9
    )

    with pytest.raises(Exception, match=r"(?i)disconnected|error while uploading|broken|reset"):
        new_model.push_to_hub("owner/unlucky")

    if step == "answer":  # the commit was made, and only the word of it was lost
        assert hub.files("owner/unlucky") != before
        pulled = EfficientSam3Model.from_pretrained("owner/unlucky")
        assert_same_weights(pulled, new_model)
    else:
        assert HfApi().model_info("owner/unlucky").sha == first
        assert hub.files("owner/unlucky") == before
    hub.faults.clear()
    new_model.push_to_hub("owner/unlucky")  # again, and all is well
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/unlucky"), new_model)


def test_a_commit_of_weights_that_have_not_arrived_is_refused(hub, model, monkeypatch):
    first = hub.put("owner/refused", {"README.md": b"# Nothing yet\n"})
    monkeypatch.setattr("huggingface_hub._commit_api._upload_files", lambda **options: None)

    with pytest.raises(HfHubHTTPError, match=r"model\.safetensors points to a large file"):
        model.push_to_hub("owner/refused")

    assert hub.repositories["owner/refused"].branches["main"] == first


# What goes wrong on the way down


def weights_of(repository: str, hub) -> bytes:
    return hub.files(repository)["model.safetensors"]


def test_a_download_that_is_cut_off_goes_on_where_it_stopped(hub, model, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1 << 15)  # as if weights were large
    model.push_to_hub("owner/cut")
    whole = weights_of("owner/cut", hub)
    hub.hang_up("GET", "/bucket/", after=400_000)
    hub.hang_up("GET", "/bucket/", after=100_000)

    file = hf_hub_download("owner/cut", "model.safetensors")

    ranges = [headers.get("range") for headers in hub.seen("GET", "/bucket/")]
    assert ranges[0] is None
    starts = [int(text.removeprefix("bytes=").removesuffix("-")) for text in ranges[1:]]
    assert 0 < starts[0] <= 400_000
    assert starts[0] < starts[1] <= starts[0] + 100_000
    assert Path(file).read_bytes() == whole
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


def test_a_download_that_fails_is_an_error_and_starts_again_next_time(hub, model):
    model.push_to_hub("owner/reset")
    hub.hang_up("GET", "/bucket/", after=400_000, reset=True)

    with pytest.raises(Exception, match=r"(?i)reset"):
        EfficientSam3Model.from_pretrained("owner/reset")

    cache = Path(constants.HF_HUB_CACHE)
    assert not list(cache.rglob("*.incomplete"))
    assert not list(cache.rglob("*.safetensors"))
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/reset"), model)


def test_a_hub_that_is_down_is_said_to_be(hub, model):
    model.push_to_hub("owner/down")
    hub.fail("HEAD", "/resolve/", 500, times=99)
    hub.fail("GET", "/api/models/", 500, times=99)

    with pytest.raises(OSError, match=f"couldn't connect to '{hub.url}' to load the files"):
        EfficientSam3Model.from_pretrained("owner/down")

    hub.faults.clear()
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/down"), model)
    hub.fail("HEAD", "/resolve/", 500, times=99)
    hub.fail("GET", "/api/models/", 500, times=99)
    assert_same_weights(EfficientSam3Model.from_pretrained("owner/down"), model)  # from the cache


def test_what_has_been_fetched_loads_offline(hub, model, processor, monkeypatch):
    model.push_to_hub("owner/offline")
    processor.push_to_hub("owner/offline")
    EfficientSam3Model.from_pretrained("owner/offline")
    AutoProcessor.from_pretrained("owner/offline")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()

    assert_same_weights(EfficientSam3Model.from_pretrained("owner/offline"), model)
    assert isinstance(AutoConfig.from_pretrained("owner/offline"), EfficientSam3Config)
    assert isinstance(AutoProcessor.from_pretrained("owner/offline"), EfficientSam3Processor)
    assert hub.requests == []
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        EfficientSam3Model.from_pretrained("owner/never_fetched")


def test_tokens_are_sent_to_the_hub_and_nowhere_else(hub, model):
    model.push_to_hub("owner/tokens")
    EfficientSam3Model.from_pretrained("owner/tokens")

    def tokens(method: str, path: str) -> set[str | None]:
        return {headers.get("authorization") for headers in hub.seen(method, path)}

    assert tokens("PUT", "/bucket/") == tokens("GET", "/bucket/") == {None}
    assert tokens("HEAD", "/owner/tokens/resolve/") == {"Bearer hf_owner"}
    assert tokens("POST", "/api/models/") == {"Bearer hf_owner"}


def test_auto_map_in_a_repository_names_files_that_are_in_it(hub, model, processor):
    model.push_to_hub("owner/auto_map")
    processor.push_to_hub("owner/auto_map")

    files = hub.files("owner/auto_map")
    named = [
        *json.loads(files["config.json"])["auto_map"].values(),
        *json.loads(files["processor_config.json"])["auto_map"].values(),
    ]
    assert len(named) == 5
    assert {f"{name.split('.')[0]}.py" for name in named} <= files.keys()
