"""Fixtures: tiny models and their processor, shared by the tests that do not change them."""

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before huggingface_hub reads it

import pytest
import torch
from tiny import tiny_model, tiny_tracker

from efficientsam3_hf import (
    EfficientSam3ImageProcessor,
    EfficientSam3Model,
    EfficientSam3Processor,
    EfficientSam3TrackerModel,
)
from efficientsam3_hf.tokenizer import build_tokenizer

torch.set_num_threads(1)  # tests run side by side

# transformers' own common tests, fetched by `make common-tests`.
sys.path.append(str(Path(__file__).parent / ".transformers-common" / version("transformers")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Leave out tests of a GPU where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def package_log(monkeypatch) -> logging.Logger:
    """The package's logger, whose messages caplog sees while the test runs, said before or not."""
    logging.Logger.warning_once.cache_clear()  # pyright: ignore  a method of transformers
    for name in ("transformers", "efficientsam3_hf"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return logging.getLogger("efficientsam3_hf")


@pytest.fixture(scope="session")
def model() -> EfficientSam3Model:
    """Concept model that tests must not change."""
    return tiny_model()


@pytest.fixture(scope="session")
def tracker() -> EfficientSam3TrackerModel:
    """Tracker that tests must not change."""
    return tiny_tracker()


@pytest.fixture(scope="session")
def processor() -> EfficientSam3Processor:
    """Processor of the tiny models."""
    size = {"height": 112, "width": 112}
    image_processor = EfficientSam3ImageProcessor(size=size, mask_size={"height": 32, "width": 32})
    return EfficientSam3Processor(image_processor, build_tokenizer(16))
