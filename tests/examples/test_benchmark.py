"""The benchmark script, on an image small enough to be quick."""

import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Sam3Config

from efficientsam3_hf import zoo
from examples import benchmark

VARIANTS = ["efficientsam3-repvit-s", "efficientsam3-efficientvit-s-lateral"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """JSON and Markdown of a short run over `VARIANTS`."""
    folder = tmp_path_factory.mktemp("benchmark")
    files = folder / "run.json", folder / "run.md"
    arguments = ["--image-size", "112", "--repeats", "1", "--warmup", "0", "--fuse"]
    benchmark.main([*VARIANTS, *arguments, "--json", str(files[0]), "--markdown", str(files[1])])
    return files
