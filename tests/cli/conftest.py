"""Tiny models and small worlds in folders, and the command line run in this process."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tiny_stock
from transformers.utils import logging

from efficientsam3_hf.cli.app import main
from efficientsam3_hf.data.synthetic_writer import write_synthetic

SIDE = 96
FRAMES = 4


@dataclass
class Ran:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def command(monkeypatch, capsys) -> Callable[..., Ran]:
    """Run `efficientsam3` with these arguments."""
    monkeypatch.setattr(logging, "disable_progress_bar", lambda: None)
    monkeypatch.setattr(logging, "set_verbosity_error", lambda: None)

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["efficientsam3", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        return Ran(code, printed.out, printed.err)

    return run


@pytest.fixture(scope="session")
def ours(tmp_path_factory) -> Path:
    return tiny_stock.write_ours(tmp_path_factory.mktemp("tiny-ours"))


@pytest.fixture(scope="session")
def sam3(tmp_path_factory) -> Path:
    return tiny_stock.write_sam3(tmp_path_factory.mktemp("tiny-sam3"))


@pytest.fixture(scope="session")
def edgetam(tmp_path_factory) -> Path:
    return tiny_stock.write_edgetam(tmp_path_factory.mktemp("tiny-edgetam"))


@pytest.fixture(scope="session")
def lite_text(tmp_path_factory) -> Path:
    return tiny_stock.write_lite_text(tmp_path_factory.mktemp("tiny-lite-text"))


@pytest.fixture(scope="session")
def sam2(tmp_path_factory) -> Path:
    return tiny_stock.write_sam2(tmp_path_factory.mktemp("tiny-sam2"))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder of datasets: two pictures or one clip of each kind."""
    folder = tmp_path_factory.mktemp("world")
    for form in ("coco", "saco"):
        write_synthetic(folder / form, form, "val", count=4, side=SIDE)
    for form in ("davis2017", "saco_video"):
        write_synthetic(folder / form, form, "val", count=2, side=SIDE, num_frames=FRAMES)
    (folder / "text").mkdir()
    (folder / "text" / "phrases.txt").write_text("a red circle\na small violet box\nfood\n")
    return folder
