"""The benchmark script, mostly on tiny models."""

import json

import pytest
import torch
from tiny import TINY_CLIP, TINY_VIT, tiny_config, tiny_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3Config

from efficientsam3_hf import zoo
from examples import benchmark

QUICK = ["--repeats", "1", "--warmup", "0"]


def teacher_config() -> Sam3Config:
    """A tiny model of transformers itself."""
    heads = tiny_config()
    return Sam3Config(
        vision_config=TINY_VIT,
        text_config={**TINY_CLIP, "max_position_embeddings": 32},
        geometry_encoder_config=heads.geometry_encoder_config,
        detr_encoder_config=heads.detr_encoder_config,
        detr_decoder_config=heads.detr_decoder_config,
        mask_decoder_config=heads.mask_decoder_config,
    )


def measure_tiny(
    configs: dict[str, benchmark.Config], *arguments: str
) -> list[benchmark.Measurement]:
    return benchmark.measure_all(configs, benchmark.make_parser().parse_args([*QUICK, *arguments]))


def test_flops_of_the_parts_sum_to_those_of_the_whole():
    model = tiny_model().requires_grad_(False)
    inputs = {
        "pixel_values": torch.zeros(1, 3, 112, 112),
        "input_ids": torch.zeros(1, 16, dtype=torch.long),
    }
    with FlopCounterMode(display=False) as counter:
        model(**inputs)

    flops = benchmark.count_flops(model, lambda: model(**inputs))

    assert sum(flops.values()) == counter.get_total_flops()
    assert flops["other"] == 0
    assert all(flops[part] > 0 for part in benchmark.PARTS if part != "other")


@pytest.mark.parametrize(
    "name", ["efficientsam3-tinyvit-s", "efficientsam3-repvit-s-lateral", "sam3"]
)
def test_every_parameter_belongs_to_a_part(name):
    with torch.device("meta"):
        model = benchmark.AutoModel.from_config(zoo.config(name))

    counts = benchmark.count_parameters(model)

    assert sum(counts.values()) == model.num_parameters()
    assert counts["other"] == 0


def test_a_call_inside_another_counts_only_for_itself():
    readings = iter([0, 1, 3, 6, 10, 15])
    ledger = benchmark.Ledger(lambda: next(readings))
    inner = ledger.charge("head", lambda: None)

    ledger.charge("trunk", inner)()
    ledger.settle()

    assert ledger.amounts["trunk"] == (3 - 1) + (10 - 6)
    assert ledger.amounts["head"] == 6 - 3
    assert ledger.amounts["other"] == 1 + (15 - 10)


def test_splitting_leaves_the_model_as_it_was():
    model = tiny_model()

    benchmark.split(model, lambda: None, lambda: 0.0)

    assert not any("forward" in vars(module) for module in model.modules())


def test_vision_features_are_computed_once_for_several_phrases():
    configs = {"student": tiny_config(), benchmark.TEACHER: teacher_config()}

    one = measure_tiny(configs, "--prompts", "1")
    three = measure_tiny(configs, "--prompts", "3")

    for row, row_of_three in zip(one, three, strict=True):
        gflops, gflops_of_three = row.parts["gflops"], row_of_three.parts["gflops"]
        for part in ("trunk", "head", "neck"):
            assert gflops_of_three[part] == gflops[part]
        for part in ("text", "encoder", "mask head"):
            assert gflops_of_three[part] == pytest.approx(3 * gflops[part])


def test_ratios_compare_with_the_teacher_of_the_same_run():
    configs = {"student": tiny_config(), benchmark.TEACHER: teacher_config()}

    student, teacher = measure_tiny(configs, "--teacher")

    assert set(teacher.ratios.values()) == {1.0}
    for kind, ratio in student.ratios.items():
        assert ratio == teacher.total[kind] / student.total[kind]


def test_json_and_markdown_hold_the_run(tmp_path, capsys):
    files = tmp_path / "run.json", tmp_path / "run.md"
    arguments = ["efficientsam3-repvit-s-lateral", "--image-size", "64", "--fuse", *QUICK]

    benchmark.main([*arguments, "--json", str(files[0]), "--markdown", str(files[1])])

    report = json.loads(files[0].read_text())
    (model,) = report["models"]
    for kind in ("parameters", "gflops"):
        assert sum(model["parts"][kind].values()) == pytest.approx(model["total"][kind])
    assert model["total"]["milliseconds"] > 0
    assert model["name"] == "efficientsam3-repvit-s-lateral, 64 px, fused"
    assert report["run"]["command"].startswith(
        "python examples/benchmark.py efficientsam3-repvit-s"
    )

    tables = files[1].read_text()
    assert tables.strip() == capsys.readouterr().out.strip()
    assert report["run"]["command"] in tables
    assert f"torch {torch.__version__}" in tables


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        (["efficientsam3-repvt-s"], "Did you mean 'efficientsam3-repvit-s'"),
        (["efficientsam3-repvit-s-lateral", "--image-size", "200"], "multiples of 16"),
        (["sam3", "--image-size", "500"], "multiples of 14"),
        (["--device", "nonsense"], "--device"),
        (["--repeats", "0"], "from 1 on"),
        (["--warmup", "-1"], "--warmup"),
        (["--json", "missing/run.json"], "no folder missing"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(arguments, advice, capsys):
    with pytest.raises(SystemExit) as refusal:
        benchmark.main(arguments)

    assert refusal.value.code == 2
    assert advice in capsys.readouterr().err
