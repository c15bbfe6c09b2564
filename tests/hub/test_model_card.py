"""Model cards: true of their folder, readable by the Hub, and no bar to a card of one's own."""

import doctest
import hashlib
import json
import re
import shutil
from dataclasses import asdict, replace
from importlib.resources import files
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from released import GEOMETRY, TRACKER, VISION, convert_tiny, released, save, without
from tiny import (
    TINY_CLIP,
    TINY_TEXT,
    TINY_VIT,
    TRUNKS,
    tiny_config,
    tiny_model,
    tiny_tracker,
    tiny_vision,
)
from transformers import Pipeline, pipeline

from conversion import folder as folder_module
from conversion.convert import convert
from efficientsam3_hf import (
    EfficientSam3Model,
    EfficientSam3Processor,
    EfficientSam3TrackerModel,
    EfficientSam3TrackerProcessor,
    zoo,
)
from efficientsam3_hf.hub import contents, markdown
from efficientsam3_hf.hub.model_card import MARKER, model_card, write_model_card
from efficientsam3_hf.hub.results import (
    Result,
    TrainingRecord,
    to_model_index,
    write_results,
    write_training,
)
from efficientsam3_hf.models.checkpoint_layout import join_weights

ROOT = Path(__file__).resolve().parents[2]
RESULT = Result(
    task="promptable-concept-segmentation",
    dataset="SA-Co/Gold",
    split="test",
    metric="cgF1",
    value=12.5,
    command="python examples/evaluate.py \\\n  --split test",
    hardware="one quiet core",
    date="2026-11-21",
    revision="abc123",
    dataset_id="facebook/SACo-Gold",
)
STAGE = TrainingRecord(
    stage="encoder distillation",
    teacher="facebook/sam3",
    datasets=["owner/pictures", "a folder of pictures"],
    command="python examples/train_distill.py --stage 1",
    steps=12_000,
    hardware="eight cards",
)
HOSTILE = 'a: "b" # c\n---\n- d\'e\u2028{f} | `g` ``` <script> {{ 7 * 7 }} {% raw %} \x07 \ud800'


def save_both(folder: Path, vision=None, **fields):
    """Write a tiny concept model, and a tracker with the same trunk; both are returned."""
    model, tracker = tiny_model(vision, **fields), tiny_tracker(vision, **fields)
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    model.save_pretrained(folder, state_dict=join_weights(model.state_dict(), tracker.state_dict()))
    return model, tracker


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A folder for all tasks, that tests must not change."""
    model, tracker = tiny_model(), tiny_tracker()
    tracker.vision_encoder.backbone.load_state_dict(model.vision_encoder.backbone.state_dict())
    return zoo.save(model.config, tmp_path_factory.mktemp("made") / "whole", model, tracker)


def zoo_folder(path: Path) -> str:
    """A folder of a concept model alone, with its processor."""
    model = tiny_model()
    return str(zoo.save(model.config, path / "zoo", model))


def model_folder(path: Path, **fields) -> Path:
    """A folder of a concept model alone, without a processor."""
    tiny_model(**fields).save_pretrained(path / "model")
    return path / "model"


@pytest.fixture
def tracker_alone(tmp_path, tracker) -> Path:
    """A folder of a tracker alone."""
    folder = tmp_path / "alone"
    tracker.save_pretrained(folder)
    image_processor = zoo.processor(tiny_config()).image_processor
    EfficientSam3TrackerProcessor(image_processor).save_pretrained(folder)
    return folder


@pytest.fixture
def bare(tmp_path) -> Path:
    """A folder without weights."""
    return zoo.save(tiny_config(), tmp_path / "bare")


@pytest.fixture
def picture(tmp_path, monkeypatch) -> Image.Image:
    """The picture that the quick start opens, where it opens it."""
    monkeypatch.chdir(tmp_path)
    image = Image.linear_gradient("L").convert("RGB")
    image.save("image.jpg")
    return image


def count(*modules: torch.nn.Module) -> int:
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


def blocks(card: ModelCard, language: str = "python") -> list[str]:
    """The blocks of code in a card."""
    return re.findall(rf"^```{language}\n(.*?)^```$", card.text, re.DOTALL | re.MULTILINE)


def rows(card: ModelCard, heading: str) -> list[list[str]]:
    """The rows of the first table below a heading."""
    below = card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (table, *_) = re.findall(r"(?:^\|.*\n)+", below, re.MULTILINE)
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in table.splitlines()[2:]]
    return [[cell.strip() for cell in line] for line in lines]


def without_code(text: str) -> str:
    """Markdown less its blocks and spans of code."""
    text = re.sub(r"^(`{3,})\w+\n.*?^\1$", "", text, flags=re.DOTALL | re.MULTILINE)
    text = text.replace("\\`", "")
    return re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def section(card: ModelCard, heading: str) -> str:
    """The text below a heading, on one line."""
    return " ".join(card.text.split(f"\n## {heading}\n")[1].split("\n## ")[0].split())


def run_quick_start(folder: Path) -> list[dict]:
    """Run each block of a card as a user would, with the folder for the repository's name."""
    found = []
    for code in blocks(model_card(folder, repo_id="OWNER/name")):
        names: dict = {}
        exec(code.replace('"OWNER/name"', repr(str(folder))), names)
        found.append(names)
    return found


# Quick start and prompts


def test_the_quick_start_finds_concepts_and_segments_objects(whole, picture):
    concepts, objects = run_quick_start(whole)

    assert isinstance(concepts["model"], EfficientSam3Model)
    assert concepts["found"].keys() >= {"masks", "boxes", "scores"}
    assert concepts["found"]["masks"].shape[1:] == (256, 256)
    assert isinstance(objects["tracker"], EfficientSam3TrackerModel)
    assert objects["masks"].shape == (1, 3, 256, 256)
    assert objects["outputs"].iou_scores.shape == (1, 1, 3)


def test_the_quick_start_takes_eight_lines(whole):
    code, _ = blocks(model_card(whole))

    lines = [line for line in code.splitlines() if line]
    assert len(lines) == 8
    assert lines[0].startswith("import efficientsam3_hf")


def test_the_quick_start_of_a_tracker_alone_segments_objects(tracker_alone, picture):
    (names,) = run_quick_start(tracker_alone)

    assert isinstance(names["model"], EfficientSam3TrackerModel)
    assert names["masks"].shape == (1, 3, 256, 256)


def test_the_quick_start_without_weights_makes_a_model(bare, picture):
    concepts, objects = run_quick_start(bare)

    assert concepts["found"]["masks"].shape[1:] == (256, 256)
    assert objects["masks"].shape == (1, 3, 256, 256)


def test_every_prompt_of_the_table_is_taken_by_its_class(whole, picture):
    processors = {"EfficientSam3Model": EfficientSam3Processor.from_pretrained(whole)}
    processors["EfficientSam3TrackerModel"] = EfficientSam3TrackerProcessor.from_pretrained(whole)
    models = {
        "EfficientSam3Model": EfficientSam3Model.from_pretrained(whole),
        "EfficientSam3TrackerModel": EfficientSam3TrackerModel.from_pretrained(whole),
    }
    values = {"image": picture, "x": 40, "y": 30, "x1": 20, "y1": 20, "x2": 90, "y2": 80}
    values |= {"box": [20, 20, 90, 80], "other": [5, 5, 15, 15]}
    logits = None

    table = rows(model_card(whole), "Prompts")

    assert len(table) == 8
    for prompt, kind, call in table:
        kind, call = kind.strip("`"), call.strip("`")
        inputs = eval(f"processor({call})", {**values, "processor": processors[kind]})
        extra = {"input_masks": logits} if prompt.startswith("a mask") else {}
        with torch.no_grad():
            masks = models[kind](**inputs, **extra).pred_masks
        assert len(masks) == (2 if prompt == "several phrases" else 1)
        if kind == "EfficientSam3TrackerModel":
            logits = masks[:, 0, :1]


def test_a_card_offers_mask_generation_only_where_it_works(whole, bare, tmp_path):
    code = 'pipeline("mask-generation", model="OWNER/name")'

    folders = [whole, bare, model_folder(tmp_path)]
    offers = [code in model_card(folder, repo_id="OWNER/name").text for folder in folders]

    assert offers == [True, False, False]


# Metadata


def test_metadata_says_what_the_hub_asks_for(whole):
    data = model_card(whole, base_model="facebook/sam3").data.to_dict()

    assert data["library_name"] == "transformers"
    assert data["pipeline_tag"] == "mask-generation"
    assert data["base_model"] == "facebook/sam3"
    assert data["base_model_relation"] == "finetune"
    assert [data["license"], data["license_name"]] == ["other", "sam-license"]
    assert (whole / data["license_link"]).is_file()
    assert data["language"] == "en"
    assert "promptable-concept-segmentation" in data["tags"]
    assert all(example.keys() == {"src", "text", "example_title"} for example in data["widget"])
    assert all(example["src"].startswith("https://") for example in data["widget"])
    assert not {"datasets", "metrics", "model-index"} & data.keys()


def test_metadata_comes_back_from_the_written_card(whole):
    card = model_card(whole, results=[RESULT])

    loaded = ModelCard(str(card))

    assert loaded.data.to_dict() == card.data.to_dict()
    assert loaded.text == card.text
    assert str(loaded) == str(card)
    assert loaded.data.eval_results == to_model_index([RESULT])
    fresh = ModelCardData(**yaml.safe_load(card.data.to_yaml()))
    assert fresh.to_dict() == card.data.to_dict()


def test_a_tracker_alone_is_asked_no_phrases(tracker_alone):
    card = model_card(tracker_alone)

    assert card.data.language is None
    assert "promptable-concept-segmentation" not in card.data.tags
    assert all("text" not in example for example in card.data.widget)
    assert {row[1] for row in rows(card, "Prompts")} == {"`EfficientSam3TrackerModel`"}
    assert "phrase" not in section(card, "Limits")


def test_the_teacher_is_called_no_student(tmp_path):
    tiny_config(TINY_VIT, TINY_CLIP).save_pretrained(tmp_path)

    card = model_card(tmp_path)

    assert "SAM 3](https://arxiv.org/abs/2511.16719) itself" in card.text
    assert "knowledge-distillation" not in card.data.tags
    assert card.data.get("base_model_relation") is None


@pytest.mark.parametrize("name", ["sam3-litetext-s0", "efficientsam3-tinyvit-s-sam3text"])
def test_a_student_says_which_part_is_one(name, tmp_path):
    zoo.config(name).save_pretrained(tmp_path)

    text = " ".join(model_card(tmp_path).text.split())

    assert ("in place of its text encoder" in text) == name.startswith("sam3-litetext")
    assert ("`tiny_vit_5m_224` in place of its vision transformer" in text) == ("tinyvit" in name)


def test_no_origin_is_claimed_without_a_record(whole, bare):
    for folder, licence in ((whole, "unknown"), (bare, None)):
        card = model_card(folder)

        data = card.data.to_dict()
        assert not {"base_model", "base_model_relation", "license_name"} & data.keys()
        assert data.get("license") == licence
        assert "No record in this folder says" in section(card, "Licence")


def test_the_origin_is_that_of_the_records(tmp_path):
    folder = model_folder(tmp_path)
    write_training([replace(STAGE, teacher="/home/me/teacher"), STAGE], folder)

    card = model_card(folder)

    assert card.data.base_model == STAGE.teacher
    assert card.data.base_model_relation == "finetune"
    assert card.data.license_name == "sam-license"
    assert "No record" not in section(card, "Licence")


def test_a_converted_folder_derives_from_sam3(converted):
    assert model_card(converted).data.base_model == "facebook/sam3"


def test_commands_are_published_without_secrets_and_paths_are_warned_of(
    tmp_path, package_log, caplog
):
    folder = model_folder(tmp_path)
    secret = "hf_AbCdEfGh12345678"
    command = f"HF_TOKEN={secret} python train.py --hub-token {secret} --data /home/me/pictures"
    entry = asdict(STAGE) | {"command": command}
    (folder / "training_record.json").write_text(json.dumps([entry]))

    path = write_model_card(folder, results=[replace(RESULT, command=command)])

    assert secret not in path.read_text()
    assert secret not in (folder / "evaluation_results.json").read_text()
    assert not any(secret in file.read_text() for file in (folder / ".eval_results").iterdir())
    assert "HF_TOKEN=*** python train.py --hub-token *** --data" in path.read_text()
    assert f"{folder / 'training_record.json'} holds what looks like a token" in caplog.text
    assert caplog.text.count("name places on this machine") == 2
    assert "/home/me/pictures" in caplog.text


def test_harmless_commands_stay_as_they_are(tmp_path):
    for command in (
        "python train.py --tokenizer_name x --max_tokens 5 --token-length 7",
        "HF_TOKEN=$HF_TOKEN python a.py --password-file x",
        RESULT.command,
    ):
        assert replace(RESULT, command=command).command == command


def test_sizes_are_those_of_the_weights_that_load(tmp_path):
    model = tiny_model()
    model.save_pretrained(tmp_path / "model", max_shard_size="1MB")
    before = model_card(tmp_path / "model")

    stale = tmp_path / "model" / "model-00001-of-00099.safetensors"
    shutil.copyfile(next((tmp_path / "model").glob("model-*.safetensors")), stale)

    assert model_card(tmp_path / "model").text == before.text


def test_base_model_and_name_are_the_callers(whole):
    card = model_card(whole, name="My model", base_model="owner/teacher", results=[RESULT])

    assert card.data.base_model == "owner/teacher"
    assert card.data.model_name == "My model"
    assert "\n# My model\n" in card.text


# Parameters


@pytest.mark.parametrize("trunk", TRUNKS)
def test_parameters_are_those_of_the_models(trunk, tmp_path):
    model, tracker = save_both(tmp_path / "model", tiny_vision(trunk=trunk))

    sizes = dict(rows(model_card(tmp_path / "model"), "Sizes"))

    assert sizes["parameters of the concept model"] == f"{count(model):,}"
    assert sizes["parameters of the tracker on images"] == f"{count(tracker):,}, trunk shared"
    stored = count(model, tracker) - count(tracker.vision_encoder.backbone)
    assert sizes["parameters stored"] == f"{stored:,}"


@pytest.mark.parametrize(
    ("vision", "text"),
    [(tiny_vision("lateral"), TINY_TEXT), (TINY_VIT, TINY_CLIP), (tiny_vision(), TINY_CLIP)],
)
def test_parameters_of_every_kind_of_part_are_counted(vision, text, tmp_path):
    model, tracker = save_both(tmp_path / "model", vision, text=text)

    modules, dtypes = contents.count_parameters([tmp_path / "model/model.safetensors"], True)

    trunk = count(tracker.vision_encoder.backbone)
    assert sum(modules.values()) == count(model, tracker) - trunk
    assert modules["vision_encoder.backbone"] == trunk
    assert dtypes == ("F32",)


def test_parameters_of_a_model_saved_alone_are_counted(tmp_path, model, tracker, tracker_alone):
    model.save_pretrained(tmp_path / "concepts")

    concepts = dict(rows(model_card(tmp_path / "concepts"), "Sizes"))
    objects = dict(rows(model_card(tracker_alone), "Sizes"))

    assert concepts["parameters of the concept model"] == f"{count(model):,}"
    assert concepts["parameters stored"] == f"{count(model):,}"
    assert objects["parameters stored"] == f"{count(tracker):,}"


def test_parameters_in_shards_are_counted_once(tmp_path):
    model = tiny_model()
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model", max_shard_size="1MB")
    assert not (tmp_path / "model" / "model.safetensors").exists()

    sizes = dict(rows(model_card(tmp_path / "model"), "Sizes"))

    assert sizes["parameters stored"] == f"{count(model):,}"
    assert sizes["stored as"].startswith("BF16; 5.1 MB")


# Results and training


def test_a_card_without_results_says_so(whole):
    card = model_card(whole)

    assert "None have been measured with these weights" in section(card, "Results")
    assert "model-index" not in card.data.to_dict()
    assert not re.search(r"cgF1|mIoU|J&F", card.text)


def test_results_stand_with_the_command_that_made_them(whole):
    other = replace(RESULT, metric="pmF1", value=20.0)

    card = model_card(whole, results=[RESULT, other, replace(RESULT, split="val", value=11.0)])

    assert rows(card, "Results") == [["cgF1", "12.5"], ["pmF1", "20.0"]]
    assert blocks(card, "bash") == [f"{RESULT.command}\n"] * 2
    assert "Measured on 2026-11-21, on one quiet core, with revision `abc123`" in section(
        card, "Results"
    )
    assert card.data.metrics == ["cgF1", "pmF1"]
    assert "None have been measured" not in card.text
    assert "has not been measured" not in section(card, "Limits")


def test_given_results_are_kept_for_the_next_card(tmp_path):
    folder = model_folder(tmp_path)

    write_model_card(folder, results=[RESULT])
    first = (folder / "README.md").read_text()
    write_model_card(folder)

    assert "12.5" in first
    assert (folder / "README.md").read_text() == first
    assert (folder / ".eval_results" / "facebook-saco-gold-test_1.yaml").is_file()


def test_results_that_are_gone_leave_no_trace(tmp_path):
    folder = model_folder(tmp_path)
    write_model_card(folder, results=[RESULT])

    write_model_card(folder, results=[])

    assert "12.5" not in (folder / "README.md").read_text()
    assert not list((folder / ".eval_results").iterdir())


def test_the_training_record_is_told(tmp_path):
    folder = model_folder(tmp_path)
    write_training([STAGE, replace(STAGE, stage="end to end", datasets=["owner/more"])], folder)

    card = model_card(folder)

    assert card.data.datasets == ["owner/pictures", "owner/more"]
    assert ["steps", "12,000"] in rows(card, "Training")
    assert ["data", "owner/pictures, a folder of pictures"] in rows(card, "Training")
    assert blocks(card, "bash") == [f"{STAGE.command}\n"] * 2
    assert "end to end:" in section(card, "Training")


def test_without_a_record_nothing_is_claimed(whole):
    card = model_card(whole)

    assert "no record of the training" in section(card, "Training")
    assert "no record of where the weights come from" in section(card, "Provenance")


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, "no record in this folder says whether its training started from Apple's"),
        ("mobileclip_s0.pt", "Its training started from mobileclip\\_s0.pt."),
        ("random", None),
    ],
)
def test_the_open_question_of_the_text_tower_is_put(origin, expected, tmp_path):
    folder = model_folder(tmp_path)
    weights = {"text tower": origin} if origin else {}
    write_training([STAGE, replace(STAGE, initial_weights=weights)], folder)

    text = section(model_card(folder), "Licence")

    assert ("**Open: the text tower.**" in text) == (expected is not None)
    assert expected is None or expected in text


def test_sam3s_own_text_tower_leaves_no_question(tmp_path):
    folder = model_folder(tmp_path, text=TINY_CLIP)

    assert "Open" not in section(model_card(folder), "Licence")


# Limits


def test_a_folder_without_tracker_is_for_concepts_only(tmp_path):
    folder = model_folder(tmp_path)

    card = model_card(folder)

    assert "Concepts only" in section(card, "Limits")
    assert "EfficientSam3Tracker" not in card.text
    assert len(blocks(card)) == 1
    assert card.data.pipeline_tag == "zero-shot-object-detection"
    assert isinstance(pipeline(card.data.pipeline_tag, model=zoo_folder(tmp_path)), Pipeline)


@pytest.mark.parametrize("has_point_branch", [True, False])
def test_exemplar_points_are_offered_only_where_there_is_a_branch_for_them(
    has_point_branch, tmp_path
):
    tiny_config(has_point_branch=has_point_branch).save_pretrained(tmp_path)

    card = model_card(tmp_path)

    prompts = [row[0] for row in rows(card, "Prompts")]
    assert ("exemplar points" in prompts) == has_point_branch
    assert ("No exemplar points" in section(card, "Limits")) != has_point_branch


@pytest.mark.parametrize(
    ("vision", "expected"),
    [
        (tiny_vision("lateral"), "grid of 16 × 16 pixels"),
        (tiny_vision("sam3"), "one cell covers 32 × 32 of 112 × 112 pixels"),
        (TINY_VIT, "One token of the image encoder covers 14 × 14"),
    ],
)
def test_what_is_too_small_depends_on_the_neck(vision, expected, tmp_path):
    tiny_config(vision).save_pretrained(tmp_path)

    limits = section(model_card(tmp_path), "Limits")

    assert expected in limits
    assert ("Lateral neck" in limits) == ("grid" in expected)


def test_padding_is_a_limit_only_where_it_is_read(tmp_path):
    text = {**TINY_TEXT, "attend_to_padding": False}

    for name, tower in {"reads": TINY_TEXT, "leaves": text}.items():
        tiny_config(text=tower).save_pretrained(tmp_path / name)

    assert "reads the padding" in section(model_card(tmp_path / "reads"), "Limits")
    assert "reads the padding" not in section(model_card(tmp_path / "leaves"), "Limits")


def test_a_memory_in_the_weights_is_not_denied(tmp_path, whole):
    source = released()
    source["tracker.maskmem_tpos_enc"] = torch.zeros(7, 1, 1, 8)
    convert_tiny(save(source, tmp_path / "with_memory.pt"), tmp_path / "model")

    assert "Images only" in section(model_card(whole), "Limits")
    assert "Images only" not in section(model_card(tmp_path / "model"), "Limits")
    sizes = dict(rows(model_card(tmp_path / "model"), "Sizes"))
    assert (
        sizes["parameters of the tracker on images"] == f"{count(tiny_tracker()):,}, trunk shared"
    )


# Conversion


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """A folder converted from two files."""
    path = tmp_path_factory.mktemp("files")
    whole = released()
    partial = without(whole, GEOMETRY, *TRACKER)
    partial[f"{VISION}trunk.pos_embed"] = torch.zeros(1, 5, 8)  # left over of the teacher's
    source = save(partial, path / "stage3.pt")
    convert_tiny(source, path / "converted", save({"model": whole}, path / "sam3.pt"))
    return path / "converted"


def test_a_converted_folder_tells_which_file_gave_which_part(converted):
    card = ModelCard.load(converted / "README.md")
    manifest = json.loads((converted / "conversion_manifest.json").read_text())
    source, donor = (manifest[key]["files"][0]["sha256"] for key in ("source", "donor"))

    origins = {part: (files, digest) for part, files, digest in rows(card, "Provenance")}

    assert origins["image trunk"] == ("`stage3.pt`", f"`{source}`")
    assert origins["tracker"] == ("`sam3.pt` (donor)", f"`{donor}`")
    assert origins["geometry encoder"] == ("`sam3.pt` (donor)", f"`{donor}`")
    assert len(origins) == len(manifest["parts"])
    donated = "point branch of the geometry encoder, geometry encoder, tracker neck, tracker"
    assert f"Of another checkpoint than the rest: {donated}." in section(card, "Limits")
    assert "Converted from `stage3.pt`, completed from `sam3.pt`" in section(card, "Provenance")


def test_a_converted_card_is_that_of_the_finished_folder(converted):
    card = (converted / "README.md").read_text()

    write_model_card(converted)

    assert (converted / "README.md").read_text() == card
    assert "\n# converted\n" in card


def test_weights_that_changed_since_the_conversion_are_not_passed_off_as_converted(
    converted, tmp_path
):
    shutil.copytree(converted, tmp_path / "trained")
    model = EfficientSam3Model.from_pretrained(converted)
    with torch.no_grad():
        model.text_projection.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")

    before, after = (model_card(folder) for folder in (converted, tmp_path / "trained"))

    assert "without any change of a number" in section(before, "Provenance")
    assert "without any change of a number" not in section(after, "Provenance")
    assert "no longer those that the conversion wrote" in section(after, "Provenance")
    assert rows(after, "Provenance") == rows(before, "Provenance")


def test_what_was_left_out_is_listed_once_with_its_reason(converted):
    text = section(ModelCard.load(converted / "README.md"), "Provenance")

    assert text.count("Left out:") == 1
    assert "* 1 tensor, not kept:" in text
    assert text.count("Notes of the conversion:") == 1
    assert "The tracker has no memory" in text


def test_overwriting_a_conversion_keeps_a_persons_card(tmp_path):
    source = save(released(), tmp_path / "file.pt")
    (tmp_path / "model").mkdir()
    card = "# À moi\n".encode("latin-1")  # in whatever encoding
    (tmp_path / "model" / "README.md").write_bytes(card)
    (tmp_path / "model" / "config.json").touch()

    convert(source, tmp_path / "model", config=tiny_config(), overwrite=True)

    assert (tmp_path / "model" / "README.md").read_bytes() == card
    assert (tmp_path / "model" / "model.safetensors").is_file()


def test_a_card_that_fails_leaves_no_folder(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no card")

    monkeypatch.setattr(folder_module, "write_model_card", fail)
    source = save(released(), tmp_path / "file.pt")

    with pytest.raises(RuntimeError, match="no card"):
        convert_tiny(source, tmp_path / "model")

    assert [path.name for path in tmp_path.iterdir()] == ["file.pt"]


# Writing


def test_a_card_written_twice_is_the_same(bare):
    (bare / "README.md").unlink()

    texts = []
    for _ in range(2):
        path = write_model_card(bare)
        texts.append(path.read_bytes())

    assert texts[0] == texts[1]
    assert MARKER.encode() in texts[0]
    assert texts[0].endswith(b".\n")


def test_a_persons_card_stays(bare):
    (bare / "README.md").write_text("---\nlicense: other\n---\n# Mine\n")
    (bare / "LICENSE").write_text("mine")

    write_model_card(bare, results=[RESULT])
    zoo.save(tiny_config(), bare)

    assert (bare / "README.md").read_text() == "---\nlicense: other\n---\n# Mine\n"
    assert (bare / "LICENSE").read_text() == "mine"


def test_a_card_follows_the_weights(bare):
    before = (bare / "README.md").read_text()

    zoo.save(tiny_config(), bare, tiny_model())

    after = (bare / "README.md").read_text()
    assert "This folder holds no weights" in before
    assert "This folder holds no weights" not in after
    assert "parameters of the concept model" in after


def test_the_licence_is_the_original_to_the_byte(bare):
    text = (bare / "LICENSE").read_bytes()

    assert text.startswith(b"SAM License\nLast Updated: November 19, 2025\n")
    digest = "66f2943378feef5416f265b7746710b57f2f35be270f740e73bb122437457e8e"
    assert hashlib.sha256(text).hexdigest() == digest
    notice = (files("efficientsam3_hf") / "assets" / "NOTICE.md").read_text()
    assert "SAM_LICENSE.txt" in notice


def test_the_paper_is_cited_as_the_project_cites_it(bare):
    (entry,) = blocks(model_card(bare), "bibtex")
    (paper,) = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]

    assert f"{{{paper['title']}}}" in entry
    assert f"{{{paper['journal']}}}" in entry
    authors = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert f"{{{' and '.join(authors)}}}" in entry


@pytest.mark.parametrize(
    ("text", "found"), [(None, "there is none"), ('{"model_type": "bert"}', "it says 'bert'")]
)
def test_a_folder_of_something_else_is_an_error(text, found, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)

    with pytest.raises(ValueError, match=f"efficientsam3 or efficientsam3_tracker; .*{found}"):
        write_model_card(tmp_path)

    assert not (tmp_path / "README.md").exists()


def test_remote_code_is_mentioned_where_there_is_some(bare):
    fields = json.loads((bare / "config.json").read_text())
    before = model_card(bare).text
    del fields["auto_map"]
    (bare / "config.json").write_text(json.dumps(fields))

    assert "trust_remote_code=True" in before
    assert "trust_remote_code" not in model_card(bare).text


# Hostile texts


def test_hostile_texts_stay_texts(tmp_path):
    folder = model_folder(tmp_path)
    texts = ("task", "dataset", "split", "metric", "command", "hardware", "revision", "dataset_id")
    write_results([replace(RESULT, **dict.fromkeys(texts, HOSTILE))], folder)
    stage = {"stage": HOSTILE, "teacher": HOSTILE, "datasets": [HOSTILE], "command": HOSTILE}
    stage |= {"hardware": HOSTILE, "initial_weights": {HOSTILE: HOSTILE, "text tower": HOSTILE}}
    write_training([replace(STAGE, **stage)], folder)
    file = {"file": HOSTILE, "sha256": HOSTILE}
    origin = {"address": HOSTILE, "files": [file]}
    drop = {"reason": HOSTILE, "is_kept_beside_the_weights": False, "count": 1, "keys": []}
    manifest = {"source": origin, "donor": origin, "notes": [HOSTILE], "dropped": [drop]}
    manifest |= {"parts": [{"part": HOSTILE, "from": "donor"}], "target": [file]}
    (folder / "conversion_manifest.json").write_text(json.dumps(manifest))

    path = write_model_card(folder, name=HOSTILE, repo_id=HOSTILE, base_model=HOSTILE)

    card = ModelCard.load(path)
    harmless = 'a: "b" # c --- - d\'e {f} | `g` ``` <script> {{ 7 * 7 }} {% raw %}'
    assert card.data.base_model == card.data.model_name == harmless
    assert card.data.metrics == [harmless]
    assert card.data.get("datasets") is None
    assert str(card) == path.read_text(encoding="utf-8")
    text = without_code(card.text)
    assert "<script>" not in text
    assert "\n---\n" not in text
    assert "49" not in section(card, "Results")
    headings = re.findall(r"^## (.*)$", card.text, re.MULTILINE)
    assert headings == [
        *("Quick start", "Prompts", "Sizes", "Results", "Limits"),
        *("Training", "Provenance", "Licence", "Citation"),
    ]
    assert [len(row) for row in rows(card, "Provenance")] == [3]
    assert [len(row) for row in rows(card, "Results")] == [2]
    compile(blocks(card)[0], "quick start", "exec")


@pytest.mark.parametrize("name", ['say "yes": no', "- # |", "'", "{{ name }}", "{% if %}", "null"])
def test_names_of_folders_are_titles_as_they_are(name, tmp_path):
    tiny_config().save_pretrained(tmp_path / name)

    card = model_card(tmp_path / name, results=[RESULT])

    assert ModelCard(str(card)).data.model_name == name
    assert f"\n# {markdown.prose(name)}\n" in card.text
    compile(blocks(card)[0], "quick start", "exec")


def test_examples_in_docstrings_are_true():
    outcome = doctest.testmod(markdown)

    assert outcome.attempted > 0
    assert outcome.failed == 0
