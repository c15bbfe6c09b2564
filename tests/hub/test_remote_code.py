"""Folders and repositories that load without the package, from the code that they carry."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import (
    TINY_CLIP,
    TINY_VIT,
    tiny_model,
    tiny_tracker,
    tiny_tracker_video,
    tiny_vision,
)
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    AutoTokenizer,
)
from transformers.dynamic_module_utils import get_relative_import_files

import efficientsam3_hf
from efficientsam3_hf import EfficientSam3TrackerProcessor, auto, models, zoo
from efficientsam3_hf.models import auto_map, remote_code

PIXELS = torch.randn(1, 3, 112, 112, generator=torch.Generator().manual_seed(2))
IDS = torch.tensor([[49406, 320, 1615, 49407, *[0] * 12]])
CONCEPT = {"pixel_values": PIXELS, "input_ids": IDS}
TRACKER = {"pixel_values": PIXELS, "input_boxes": torch.tensor([[[10.0, 20.0, 80.0, 90.0]]])}
CLIP = {
    "pixel_values": torch.stack([PIXELS, PIXELS.flip(-1)], 1),
    "input_boxes": TRACKER["input_boxes"],
}
IMAGE = (torch.arange(3 * 40 * 60) % 251).reshape(3, 40, 60).to(torch.uint8)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, str]:
    """Files of inputs, by kind."""
    folder = tmp_path_factory.mktemp("inputs")
    kinds = {
        "concept": CONCEPT,
        "tracker": TRACKER,
        "clip": CLIP,
        "pixels": {"pixel_values": PIXELS},
        "ids": {"input_ids": IDS},
        "lateral": {**CONCEPT, "pixel_values": torch.nn.functional.pad(PIXELS, (8, 8, 8, 8))},
    }
    for name, tensors in kinds.items():
        save_file(tensors, folder / name)
    return {name: str(folder / name) for name in kinds}


@pytest.fixture(scope="module")
def joint(model, joint_tracker, tmp_path_factory) -> Path:
    """One folder for all tasks. Its name is no name of a module."""
    folder = tmp_path_factory.mktemp("joint") / "1.0-efficientsam3.tiny"
    joint_tracker.save_pretrained(folder)  # as one does on the way; nothing of it may be in the way
    return zoo.save(model.config, folder, model, joint_tracker)


def assert_same_outputs(file: Path, model: torch.nn.Module, inputs: str) -> None:
    """Assert that a file holds exactly what a model computes."""
    with torch.no_grad():
        expected = model(**load_file(inputs))
    outputs = load_file(file)
    tensors = {name: value for name, value in expected.items() if isinstance(value, torch.Tensor)}
    assert outputs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(outputs[name], tensor), name


def test_a_fresh_process_cannot_import_the_package(fresh):
    assert not fresh.run("can_import", "efficientsam3_hf")
    assert fresh.run("can_import", "transformers")


PARTS = {
    "concept": lambda: tiny_model(),
    "concept with SAM 3's encoders": lambda: tiny_model(TINY_VIT, TINY_CLIP),
    "lateral": lambda: tiny_model(tiny_vision("lateral")),
    "tracker": lambda: tiny_tracker(),
    "clip of the tracker in video": lambda: tiny_tracker_video("perceiver"),
    "vision": lambda: tiny_model().vision_encoder,
    "backbone": lambda: tiny_model().vision_encoder.backbone,
    "text": lambda: tiny_model().text_encoder,
}
KINDS = {"vision": "pixels", "backbone": "pixels", "text": "ids"}


@pytest.mark.parametrize("part", PARTS)
def test_every_model_computes_the_same_from_remote_code(part: str, fresh, inputs, tmp_path):
    model = PARTS[part]()
    model.save_pretrained(tmp_path / "model")
    file = inputs[KINDS.get(part, part.split(" ")[0])]

    name, module = fresh.run("compute", "AutoModel", tmp_path / "model", file, tmp_path / "out")

    assert name == type(model).__name__
    assert module.startswith("transformers_modules.")
    assert_same_outputs(tmp_path / "out", model, file)


def test_one_folder_serves_concept_model_and_tracker_from_remote_code(
    joint, model, joint_tracker, fresh, inputs, tmp_path
):
    out = tmp_path / "out"

    name, module = fresh.run("compute", "AutoModel", joint, inputs["concept"], out)
    assert (name, module.split(".")[0]) == ("EfficientSam3Model", "transformers_modules")
    assert_same_outputs(out, model, inputs["concept"])

    name, module = fresh.run("compute", "AutoModelForMaskGeneration", joint, inputs["tracker"], out)
    assert (name, module.split(".")[0]) == ("EfficientSam3TrackerModel", "transformers_modules")
    assert_same_outputs(out, joint_tracker, inputs["tracker"])


def test_one_repository_serves_concept_model_and_tracker_from_remote_code(
    joint, model, joint_tracker, fresh, hub, inputs, tmp_path
):
    hub.put("owner/joint-1.0", {file.name: file.read_bytes() for file in joint.iterdir()})
    out = tmp_path / "out"

    name, module = fresh.run("compute", "AutoModel", "owner/joint-1.0", inputs["concept"], out)
    assert (name, module.split(".")[0]) == ("EfficientSam3Model", "transformers_modules")
    assert_same_outputs(out, model, inputs["concept"])

    name, module = fresh.run(
        "compute", "AutoModelForMaskGeneration", "owner/joint-1.0", inputs["tracker"], out
    )
    assert (name, module.split(".")[0]) == ("EfficientSam3TrackerModel", "transformers_modules")
    assert_same_outputs(out, joint_tracker, inputs["tracker"])

    hub.requests.clear()
    fresh.run("compute_offline", "AutoModel", "owner/joint-1.0", inputs["concept"], out)
    assert_same_outputs(out, model, inputs["concept"])
    assert hub.requests == []


@pytest.mark.parametrize("place", ["folder", "repository"])
def test_every_processor_gives_the_same_from_remote_code(place: str, joint, fresh, hub, tmp_path):
    hub.put("owner/processors", {file.name: file.read_bytes() for file in joint.iterdir()})
    source = {"folder": str(joint), "repository": "owner/processors"}[place]
    processor = AutoProcessor.from_pretrained(joint)

    classes = fresh.run("process", source, tmp_path / "out")

    assert classes == {
        "processor": "EfficientSam3Processor",
        "its image processor": "EfficientSam3ImageProcessor",
        "image processor": "EfficientSam3ImageProcessor",
        "tokenizer": "CLIPTokenizer",
        "tracker's processor": "EfficientSam3TrackerProcessor",
    }
    box = [[[1.0, 2.0, 30.0, 35.0]]]
    expected = dict(processor(images=IMAGE, text="a red car", input_boxes=box))
    expected["image_processor"] = processor.image_processor(IMAGE, return_tensors="pt")[
        "pixel_values"
    ]
    tracker_processor = EfficientSam3TrackerProcessor(processor.image_processor)
    expected["tracker_boxes"] = tracker_processor(images=IMAGE, input_boxes=box)["input_boxes"]
    outputs = load_file(tmp_path / "out")
    assert outputs.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(outputs[name], torch.as_tensor(value)), name


def test_configurations_and_their_parts_come_from_remote_code(joint, fresh):
    result = fresh.run("configuration", joint)

    assert result["class"] == "EfficientSam3Config"
    assert result["values"] == json.loads(AutoConfig.from_pretrained(joint).to_json_string())
    own = ("vision_config", "text_config", "tracker_config")
    assert all(result["parts"][name].startswith("transformers_modules.") for name in own)


def test_there_is_one_copy_of_each_class_however_things_are_loaded(joint, fresh, tmp_path):
    other = shutil.copytree(joint, tmp_path / "other")  # the same code under another name

    (module,) = fresh.run("copies_of_the_configuration", joint, other)

    assert module.startswith("transformers_modules.")


def test_what_remote_code_saves_loads_again(joint, model, joint_tracker, fresh, inputs, tmp_path):
    again, tracker = tmp_path / "again", tmp_path / "tracker"
    fresh.run("save_again", {"AutoModel": str(again), "AutoProcessor": str(again)}, joint)
    fresh.run("save_again", {"AutoModelForMaskGeneration": str(tracker)}, joint)

    assert code(again) == code(tracker) == code(joint)
    for file in ("config.json", "processor_config.json"):
        first, second = (json.loads((folder / file).read_text()) for folder in (joint, again))
        assert first["auto_map"] == second["auto_map"]
    fresh.run("compute", "AutoModel", again, inputs["concept"], tmp_path / "out")
    assert_same_outputs(tmp_path / "out", model, inputs["concept"])
    for auto_class in ("AutoModel", "AutoModelForMaskGeneration"):
        fresh.run("compute", auto_class, tracker, inputs["tracker"], tmp_path / "out")
        assert_same_outputs(tmp_path / "out", joint_tracker, inputs["tracker"])
    fresh.run("process", again, tmp_path / "out")
    assert type(AutoModel.from_pretrained(again)) is type(model)  # with the package, its classes


def test_what_remote_code_pushes_loads_again(joint, model, fresh, hub, inputs, tmp_path):
    hub.put("owner/source", {file.name: file.read_bytes() for file in joint.iterdir()})

    fresh.run("push_again", "AutoModel", "owner/source", "owner/again")
    fresh.run("push_again", "AutoProcessor", "owner/source", "owner/again")

    sent = hub.files("owner/again")
    assert {name: sent[name] for name in code(joint)} == code(joint)
    assert b"An `EfficientSam3Model` of `efficientsam3_hf`" in sent["README.md"]
    fresh.run("compute", "AutoModel", "owner/again", inputs["concept"], tmp_path / "out")
    assert_same_outputs(tmp_path / "out", model, inputs["concept"])


def test_without_trust_nothing_runs_and_the_error_says_what_to_do(joint, fresh):
    for auto_class in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"):
        message = fresh.run("error", auto_class, joint, trust_remote_code=False)
        assert "trust_remote_code=True" in message, auto_class
        assert "contains custom code" in message, auto_class


@pytest.mark.parametrize("library", ["timm", "ftfy"])
def test_a_library_that_is_missing_is_named_with_how_to_install_it(library: str, joint, fresh):
    message = fresh.run("error_without", library, joint)

    assert f"`pip install {library}`" in message


def test_asking_for_a_tracker_where_there_is_none_is_an_error_that_says_so(model, fresh, tmp_path):
    config = tiny_model().config
    config.tracker_config = None
    folder = zoo.save(config, tmp_path, type(model)(config))

    assert "AutoModelForMaskGeneration" not in AutoConfig.from_pretrained(folder).auto_map
    message = fresh.run("error", "AutoModelForMaskGeneration", folder)
    assert "the checkpoint serves concepts only" in message


@pytest.mark.parametrize("trust", [None, False, True])
def test_where_the_package_is_imported_its_own_classes_win_and_nobody_is_asked(
    trust: bool | None, joint, monkeypatch
):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail(f"Asked: {prompt}"))
    classes = {
        AutoConfig: efficientsam3_hf.EfficientSam3Config,
        AutoModel: efficientsam3_hf.EfficientSam3Model,
        AutoModelForMaskGeneration: efficientsam3_hf.EfficientSam3TrackerModel,
        AutoProcessor: efficientsam3_hf.EfficientSam3Processor,
        AutoImageProcessor: efficientsam3_hf.EfficientSam3ImageProcessor,
    }
    options = {} if trust is None else {"trust_remote_code": trust}

    for auto_class, expected in classes.items():
        assert type(auto_class.from_pretrained(joint, **options)) is expected
    assert type(AutoTokenizer.from_pretrained(joint, **options)).__name__ == "CLIPTokenizer"
    config = AutoConfig.from_pretrained(joint)
    with torch.device("meta"):
        assert type(AutoModel.from_config(config)) is efficientsam3_hf.EfficientSam3Model


def code(folder: Path) -> dict[str, bytes]:
    """The code in a folder."""
    return {file.name: file.read_bytes() for file in folder.glob("*.py")}


MODELS = Path(models.__file__).parent
REMOTE_FILES = sorted(file for file in MODELS.glob("*.py") if file.name != "__init__.py")


def test_a_folder_holds_every_file_of_the_models(joint):
    assert code(joint) == {file.name: file.read_bytes() for file in REMOTE_FILES}


@pytest.mark.parametrize("file", REMOTE_FILES, ids=lambda file: file.stem)
def test_remote_files_import_in_the_one_way_that_works(file: Path):
    source = file.read_text()
    siblings = {f"{other.stem}" for other in REMOTE_FILES}
    tree = ast.parse(source)

    relative = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            assert not any(name.split(".")[0] == "efficientsam3_hf" for name in names), names
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            assert str(node.module).split(".")[0] != "efficientsam3_hf", node.module
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 1, "transformers copies siblings only"
            assert node.module in siblings, "`from . import x` and packages are not copied"
            assert node in tree.body, "at the top: not in a function, TYPE_CHECKING or try"
            relative.add(node.module)
    # transformers reads imports line by line, in strings as well.
    assert set(re.findall(r"^\s*from\s+\.(\S+)\s+import", source, re.MULTILINE)) == relative
    assert not re.search(r"^\s*import\s+\.", source, re.MULTILINE)
    assert not file.name.startswith("_"), "Trainer does not send files of such names"


def test_every_sibling_that_is_imported_is_copied():
    reachable = {Path(file) for file in get_relative_import_files(MODELS / "remote_code.py")}

    assert {MODELS / "remote_code.py", *reachable} == set(REMOTE_FILES)


def test_remote_code_has_every_class_that_the_package_registers():
    remote = auto_map.AUTO_CLASSES
    for auto_class, rows in auto.MODEL_ROWS.items():
        for config, model in rows:
            assert remote[config][auto_class] == model
    for _, processor in auto.PROCESSOR_ROWS:
        assert remote[processor] == {"AutoProcessor": processor}
    # Pipelines have a way of their own into a folder (test_pipelines.py), sessions have none.
    public = {name for name in efficientsam3_hf.__all__ if name[0].isupper()}
    public = {name for name in public if not name.endswith(("Pipeline", "Session"))}
    assert set(remote_code.__all__) == public
    assert {name for loaded in remote.values() for name in loaded.values()} | set(remote) == public
    for name in remote:
        assert issubclass(getattr(remote_code, name), auto_map.SelfContainedMixin), name
