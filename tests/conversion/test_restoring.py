"""The way back to released names, for every file there is; and to released bytes."""

import pytest
import torch
from released import our_weights, released
from tiny import TINY_CLIP, TINY_VIT, TRUNKS, tiny_vision
from torch import Tensor

from conversion import export_original
from conversion.inverse_tables import find_released_names
from conversion.renaming import find_moves, rename
from conversion.restoring import find_extras, restore, spell_released
from tests.parity.materialise import find_case, list_cases, read_manifest

VISION = "detector.backbone.vision_backbone."
FILES = [
    (case, manifest.name.removesuffix(".json.gz"))
    for case in list_cases()
    for manifest in sorted(find_case(case).glob("*.json.gz"))
]


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """The same keys, and the same bits."""
    assert one.keys() == other.keys()
    for key, tensor in one.items():
        assert tensor.dtype == other[key].dtype, key
        assert torch.equal(tensor, other[key]), key


def shapes(weights: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in weights.items()}


@pytest.mark.parametrize(("case", "manifest"), FILES)
def test_names_of_every_file_are_found_again(case: str, manifest: str):
    entries = read_manifest(case, manifest)["checkpoint"]["tensors"]
    source = {key: torch.empty(e["shape"], device="meta") for key, e in entries.items()}
    renamed = rename(source)
    own = {k: v for k, v in renamed.weights.items() if "shared_image_embedding" not in k}

    moves = find_released_names(own)

    expected = {spell_released(key): target for key, target in find_moves(source).items()}
    assert moves == expected


@pytest.mark.parametrize("trunk", TRUNKS)
def test_released_weights_come_back_bit_by_bit(trunk: str):
    source = released(tiny_vision(trunk=trunk))

    renamed = rename(source)

    assert_same(restore(renamed.weights, find_extras(source, renamed)), source)
    assert_same(renamed.weights, our_weights(tiny_vision(trunk=trunk)))


def vit_release() -> dict[str, Tensor]:
    """Tiny SAM 3 as Meta saved it: with a class token's position and rotary tables."""
    source = released(TINY_VIT, TINY_CLIP)
    source[f"{VISION}trunk.pos_embed"][:, 0] = torch.randn(32)
    for block in range(2):
        key = f"{VISION}trunk.blocks.{block}.attn.freqs_cis"
        source[key] = torch.randn(16, 4, dtype=torch.complex64)
    return source


def test_what_no_model_reads_is_set_aside_for_the_way_back():
    source = vit_release()

    renamed = rename(source)
    extras = find_extras(source, renamed)

    assert_same(restore(renamed.weights, extras), source)
    assert len(extras) == 3
    assert len(renamed.dropped) == 2


def test_a_vit_trained_since_gets_a_row_of_zeros_that_nothing_reads():
    source = vit_release()

    back = restore(rename(source).weights, {})

    table = back[f"{VISION}trunk.pos_embed"]
    assert not table[:, 0].any()
    assert torch.equal(table[:, 1:], source[f"{VISION}trunk.pos_embed"][:, 1:])


def test_left_overs_of_another_model_are_not_set_aside():
    source = released() | {f"{VISION}trunk.blocks.0.norm1.bias": torch.zeros(4)}

    assert find_extras(source, rename(source)) == {}


def test_sam31_gets_its_own_names_back():
    plain = released()
    source = {key: value for key, value in plain.items() if not key.startswith("tracker.")}
    source = {key.replace("sam2_convs", "interactive_convs"): v for key, v in source.items()}
    source |= {
        key.replace("interactive", "propagation"): v + 1
        for key, v in source.items()
        if "interactive_convs" in key
    }
    for key, value in plain.items():
        name = key.removeprefix("tracker.")
        if key == "tracker.no_mem_embed":
            source["tracker.model.interactivity_no_mem_embed"] = value
        elif key.startswith("tracker."):
            source[f"tracker.model.interactive_{name}"] = value
            source[f"tracker.model.{name}"] = value + 1
    renamed = rename(source)

    back = restore(renamed.weights, find_extras(source, renamed), find_moves(source))

    assert_same(back, source)


def test_tables_that_must_be_one_are_refused_when_they_differ():
    weights = our_weights()
    weights["tracker_model.shared_image_embedding.positional_embedding"] += 1

    with pytest.raises(ValueError, match="differ, but a released file has one place for both"):
        restore(weights, {})


def test_models_that_were_never_released_cannot_be_written_back():
    weights = our_weights(tiny_vision("lateral"))

    with pytest.raises(ValueError, match=r"no place in a released file.*laterals"):
        restore(weights, {})


def test_export_writes_the_file_or_nothing(tmp_path, capsys):
    (tmp_path / "model").mkdir()

    assert export_original.main([str(tmp_path / "model"), str(tmp_path / "out.pt")]) == 1

    assert "no config.json" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
