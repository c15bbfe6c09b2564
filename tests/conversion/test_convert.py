"""One released file to one folder: every form, equal weights, and a full account."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from released import VISION, convert_tiny, our_weights, released, save, without
from safetensors.torch import load_file, save_file
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
from transformers import AutoModel, AutoProcessor

from conversion import convert as convert_script
from conversion import export_original, verify
from conversion.convert import convert
from conversion.folder import atomic_folder
from conversion.sources import Source
from efficientsam3_hf import EfficientSam3Model, EfficientSam3TrackerModel, zoo
from efficientsam3_hf.models.checkpoint_layout import tracker_weights
from tests.parity.materialise import read_manifest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
INPUTS = {"pixel_values": torch.randn(1, 3, 112, 112), "input_ids": torch.arange(16)[None]}


@pytest.fixture(scope="module")
def whole():
    return released()


@pytest.fixture(scope="module")
def folder(whole, tmp_path_factory):
    """A converted tiny model, with its record."""
    path = tmp_path_factory.mktemp("converted")
    convert_tiny(save({"model": whole}, path / "whole.pt"), path / "model")
    return path / "model"


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal but for rounding, which depends on where in memory weights lie."""
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def record_of(folder: Path) -> dict:
    return json.loads((folder / "conversion_manifest.json").read_text())


def bytes_of(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def builder_form(weights):
    return {
        key.removeprefix("detector.").replace("tracker.", "inst_interactive_predictor.model."): v
        for key, v in weights.items()
    }


def legacy_form(weights):
    infix = {
        key.replace("trunk.model.", "trunk.model.student_trunk."): v for key, v in weights.items()
    }
    left_over = {
        "pos_embed": torch.zeros(1, 5, 8),
        "patch_embed.proj.weight": torch.zeros(8, 3, 2, 2),
        "blocks.0.attn.freqs_cis": torch.zeros(4, 2, dtype=torch.complex64),
    }
    return infix | {f"{VISION}trunk.{key}": value for key, value in left_over.items()}


FORMS = {
    "bare": lambda weights: weights,
    "state_dict": lambda weights: {"state_dict": weights},
    "with fields": lambda weights: {"model": weights, "meta": {"epoch": 3}},
    "builder": builder_form,
    "trainer": lambda weights: {"model": builder_form(weights), "epoch": 19, "steps": {"train": 1}},
    "legacy": legacy_form,
    "shuffled": lambda weights: dict(reversed(weights.items())),
}


@pytest.mark.parametrize("trunk", TRUNKS)
def test_converted_models_give_the_outputs_of_the_original(tmp_path, trunk):
    vision = tiny_vision(trunk=trunk)
    source = save(released(vision), tmp_path / "file.pt")

    convert_tiny(source, tmp_path / "model", config=tiny_config(vision))

    model, tracker = tiny_model(vision), tiny_tracker(vision)
    tracker.load_state_dict(tracker_weights(our_weights(vision)))  # with the model's trunk
    clicks = {"input_points": torch.full((1, 1, 1, 2), 40.0), "input_labels": torch.ones(1, 1, 1)}
    clicks["input_labels"] = clicks["input_labels"].long()
    with torch.no_grad():
        expected, masks = model(**INPUTS), tracker(INPUTS["pixel_values"], **clicks)
        found = AutoModel.from_pretrained(tmp_path / "model")(**INPUTS)
        again = EfficientSam3TrackerModel.from_pretrained(tmp_path / "model")(
            INPUTS["pixel_values"], **clicks
        )
    assert_close(found.pred_masks, expected.pred_masks)
    assert_close(found.pred_logits, expected.pred_logits)
    assert_close(again.pred_masks, masks.pred_masks)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_folder(whole, folder, tmp_path, form):
    source = save(FORMS[form](whole), tmp_path / "file.pth")

    record = convert_tiny(source, tmp_path / "model")

    assert bytes_of(tmp_path / "model") == bytes_of(folder)
    assert len(record["converted"]) == len(whole)
    assert sum(drop["count"] for drop in record["dropped"]) == (3 if form == "legacy" else 0)


def test_safetensors_give_the_same_folder(whole, folder, tmp_path):
    save_file({key: value.clone() for key, value in whole.items()}, tmp_path / "file.safetensors")

    convert_tiny(Source("file", tmp_path / "file.safetensors", "file"), tmp_path / "model")

    assert bytes_of(tmp_path / "model") == bytes_of(folder)


def test_a_folder_of_transformers_is_a_source_too(folder, tmp_path):
    record = convert_tiny(Source("model", folder, "model"), tmp_path / "again")

    assert bytes_of(tmp_path / "again") == bytes_of(folder)
    assert record["converted"] == {}


def test_a_folder_holds_all_that_a_user_needs(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert "remote_code.py" in names
    assert [name for name in names if not name.endswith(".py")] == [
        "LICENSE",
        "README.md",
        "config.json",
        "conversion_manifest.json",
        "model.safetensors",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    encoding = AutoProcessor.from_pretrained(folder)(text="a red car")
    assert encoding["input_ids"].shape == (1, 16)
    assert "SAM License" in (folder / "LICENSE").read_text()


def test_a_file_without_tracker_serves_concepts_only(whole, tmp_path):
    source = save(without(whole, "tracker.", f"{VISION}sam2_convs."), tmp_path / "file.pt")

    record = convert_tiny(source, tmp_path / "model")

    assert "concept model only" in record["notes"][0]
    assert EfficientSam3Model.from_pretrained(tmp_path / "model").config.tracker_config is None


def test_a_long_position_table_is_interpolated_when_read(tmp_path):
    text = {**TINY_TEXT, "max_position_embeddings": 77, "context_length": 32}
    source = save(released(text=text), tmp_path / "file.pt")

    convert_tiny(source, tmp_path / "model", config=tiny_config(text=text))

    tower = EfficientSam3Model.from_pretrained(tmp_path / "model").text_encoder
    table = our_weights(text=text)[
        "detector_model.text_encoder.embeddings.position_embedding.position_embedding"
    ]
    expected = torch.nn.functional.interpolate(table, (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(tower.position_rows(32), expected)
    assert AutoProcessor.from_pretrained(tmp_path / "model").tokenizer.model_max_length == 32


def test_sam3_itself_is_converted(tmp_path):
    source = released(TINY_VIT, TINY_CLIP)
    source[f"{VISION}trunk.blocks.0.attn.freqs_cis"] = torch.zeros(16, 4, dtype=torch.complex64)

    record = convert_tiny(
        save(source, tmp_path / "sam3.pt"),
        tmp_path / "model",
        config=tiny_config(TINY_VIT, TINY_CLIP),
    )

    (drop,) = record["dropped"]
    assert drop["is_kept_beside_the_weights"]
    extras = load_file(tmp_path / "model" / "original_extras.safetensors")
    assert extras.keys() == {
        f"{VISION}trunk.blocks.0.attn.freqs_cis",
        f"{VISION}trunk.pos_embed[class_token]",
    }
    model = EfficientSam3Model.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        expected = tiny_model(TINY_VIT, TINY_CLIP)(**INPUTS)
        assert_close(model(**INPUTS).pred_masks, expected.pred_masks)


def test_necks_of_three_levels_are_converted(whole, tmp_path):
    config = tiny_config(tiny_vision() | {"scale_factors": [4.0, 2.0, 1.0]})
    source = {key: value for key, value in whole.items() if "convs.3." not in key}

    convert_tiny(save(source, tmp_path / "file.pt"), tmp_path / "model", config=config)

    with torch.no_grad():
        found = EfficientSam3Model.from_pretrained(tmp_path / "model")(**INPUTS)
        assert_close(found.pred_masks, tiny_model()(**INPUTS).pred_masks)


def test_the_manifest_accounts_for_every_tensor(whole, tmp_path):
    source = save(legacy_form(whole), tmp_path / "file.pt")

    convert_tiny(source, tmp_path / "model")

    record = record_of(tmp_path / "model")
    dropped = [key for drop in record["dropped"] for key in drop["keys"]]
    assert sorted([*record["converted"], *dropped]) == sorted(legacy_form(whole))
    assert sum(rule["tensors"] for rule in record["rules"]) == len(record["converted"])
    assert record["dropped"][0]["reason"].startswith("left over from the teacher's ViT")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert sum(part["tensors"] for part in record["parts"]) == len(stored)
    assert record["versions"].keys() >= {"python", "torch", "tokenizers", "efficientsam3-hf"}
    for about, path in (
        (record["source"]["files"][0], source.path),
        (record["target"][0], tmp_path / "model" / "model.safetensors"),
    ):
        output = subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True)
        assert about["sha256"] == output.stdout.split()[0]
        assert about["bytes"] == path.stat().st_size
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("key", ["detector.mystery.weight", "tracker.more", "epoch_counter"])
def test_a_key_that_nobody_knows_stops_the_conversion(whole, tmp_path, key):
    source = save(whole | {key: torch.zeros(1)}, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=f"match no pattern.*{key}"):
        convert_tiny(source, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_weights_of_another_size_stop_the_conversion(whole, tmp_path):
    key = "detector.dot_prod_scoring.hs_proj.bias"
    source = save(whole | {key: torch.zeros(7)}, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=r"1 misshaped \(dot_product_scoring\.query_proj\.bias"):
        convert_tiny(source, tmp_path / "model")


@pytest.mark.parametrize("shape", [(), (2,), (4, 4)])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_fused_projections_of_odd_shape_stop_the_conversion(whole, tmp_path, kind, shape):
    key = f"detector.transformer.decoder.layers.0.self_attn.in_proj_{kind}"
    assert key in whole
    source = save(whole | {key: torch.zeros(shape)}, tmp_path / "file.pt")

    with pytest.raises(ValueError, match=rf"{key} has shape \({', '.join(map(str, shape))}"):
        convert_tiny(source, tmp_path / "model")


@pytest.mark.parametrize("place", [".", "deep"])
def test_what_is_read_is_never_replaced(whole, tmp_path, place):
    (tmp_path / "out" / place).mkdir(parents=True)
    (tmp_path / "out" / "config.json").touch()
    donor = save(whole, tmp_path / "donor.pt")
    source = save(whole, tmp_path / "out" / place / "file.pt")

    with pytest.raises(ValueError, match="which would be replaced"):
        convert(source, tmp_path / "out", config=tiny_config(), overwrite=True)
    with pytest.raises(ValueError, match="which would be replaced"):
        convert(donor, tmp_path / "out", source, config=tiny_config(), overwrite=True)
    assert source.path.is_file()


def test_the_state_of_a_training_is_in_the_record(whole, tmp_path):
    content = {"model": whole, "optimizer": {"state": {0: torch.zeros(2)}}}

    record = convert_tiny(save(content, tmp_path / "file.pt"), tmp_path / "model")

    (drop,) = record["dropped"]
    assert drop["keys"] == ["optimizer"]
    assert not drop["is_kept_beside_the_weights"]


def test_asked_to_end_a_conversion_leaves_nothing(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    try:
        convert_script.end_on_sigterm()
        with pytest.raises(SystemExit), atomic_folder(tmp_path / "model"):
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)

    assert list(tmp_path.iterdir()) == []


def test_a_tracker_alone_has_no_released_form(tmp_path):
    tiny_tracker().save_pretrained(tmp_path / "tracker")

    with pytest.raises(ValueError, match="a tracker that transformers saved alone"):
        export_original.export(tmp_path / "tracker", tmp_path / "back.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_precision_is_kept(whole, tmp_path, dtype):
    half = {k: v.to(dtype) if v.is_floating_point() else v for k, v in whole.items()}

    convert_tiny(save(half, tmp_path / "file.pt"), tmp_path / "model")

    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {dtype}


@pytest.mark.parametrize("form", FORMS)
def test_the_way_back_is_exact(whole, tmp_path, form):
    convert_tiny(save(FORMS[form](whole), tmp_path / "file.pt"), tmp_path / "model")

    assert export_original.main([str(tmp_path / "model"), str(tmp_path / "back.pt")]) == 0

    back = torch.load(tmp_path / "back.pt", weights_only=True)["model"]
    assert back.keys() == whole.keys()
    assert all(torch.equal(back[key], whole[key]) for key in whole)


def test_a_folder_trained_since_is_written_back(folder, tmp_path):
    model = EfficientSam3Model.from_pretrained(folder)
    with torch.no_grad():
        model.dot_product_scoring.query_proj.bias.add_(1)
    zoo.save(model.config, tmp_path / "model", model=model)

    back = export_original.export(tmp_path / "model", tmp_path / "back.pt")

    key = "detector.dot_prod_scoring.hs_proj.bias"
    assert torch.equal(back[key], model.dot_product_scoring.query_proj.bias)
    with pytest.raises(FileExistsError, match="--overwrite"):
        export_original.export(tmp_path / "model", tmp_path / "back.pt")


@pytest.mark.parametrize("script", [convert_script, export_original, verify])
def test_help_teaches(script, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(["--help"])

    assert end.value.code == 0
    assert f"python conversion/{script.__name__.split('.')[-1]}.py" in capsys.readouterr().out


def test_scripts_run_from_anywhere(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "conversion" / "convert.py"),
        "absent.pt",
        "--output",
        "x",
    ]

    process = subprocess.run(command, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True)

    assert process.returncode == 1
    assert "error: There is no file or folder absent.pt" in process.stderr


def test_all_files_of_a_folder_are_tried(whole, tmp_path, capsys):
    (tmp_path / "files").mkdir()
    save(whole, tmp_path / "files" / "tiny.pt")  # of a size that the zoo lacks
    (tmp_path / "files" / "broken.pt").write_bytes(b"PK, and no more")

    code = convert_script.main([str(tmp_path / "files"), "--output", str(tmp_path / "out")])

    error = capsys.readouterr().err
    assert code == 1
    assert "broken.pt: " in error
    assert "truncated" in error
    assert "No text tower of the zoo has width 32" in error or "ends in" in error
    assert "2 of 2 failed" in error
    assert not (tmp_path / "out").exists()


MEASURED = """
import resource, sys
from conversion.convert import main
import conversion.verify
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print("grown by", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.slow
def test_memory_stays_below_one_and_a_half_files(tmp_path):
    case = "rv_m_s0_ctx16"
    entries = read_manifest(case)
    tensors = entries["checkpoint"]["tensors"] | entries["donor"]["tensors"]
    weights = {
        key: torch.zeros(e["shape"], dtype=getattr(torch, e["dtype"])) for key, e in tensors.items()
    }
    file = save({"model": weights}, tmp_path / "repvit_m.pt").path
    del weights

    process = subprocess.run(
        [sys.executable, "-c", MEASURED, str(file), "--output", str(tmp_path / "out"), "--quiet"],
        env=ENVIRONMENT,
        capture_output=True, text=True, check=True,
    )  # fmt: skip

    grown = int(process.stdout.split("grown by ")[1])
    assert file.stat().st_size > 300e6
    assert grown < 1.5 * file.stat().st_size
    assert "is efficientsam3-repvit-m\n" in process.stdout
