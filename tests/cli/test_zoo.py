"""`efficientsam3 zoo`."""

import json

from efficientsam3_hf import zoo
from efficientsam3_hf.cli.zoo import sizes


def test_all_variants_are_listed(command, monkeypatch):
    monkeypatch.setattr("efficientsam3_hf.cli.zoo.sizes", lambda name: {"name": name, "all": 1.0})

    assert [row["name"] for row in command("zoo", "--json").json] == zoo.names()
    assert "efficientsam3-tinyvit-s" in command("zoo").out


def test_sizes_of_parts_add_up():
    row = sizes("efficientsam3-efficientvit-s")

    assert round(row["all"], 3) == round(row["vision"] + row["text"] + row["heads"], 3)
    assert 90 < row["all"] < 95  # README's table: 93.3


def test_a_configuration_is_shown(command):
    shown = json.loads(command("zoo", "efficientsam3-repvit-m", "--json").out)

    assert shown["vision_config"]["backbone_config"]["trunk"] == "repvit_m1_1"


def test_an_unknown_name_is_answered_by_those_like_it(command):
    ran = command("zoo", "efficientsam3-tinyvit-x")

    assert ran.code == 2
    assert "Did you mean 'efficientsam3-tinyvit-s'" in ran.err
