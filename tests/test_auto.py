"""The plugin: what importing it costs, and what it makes known to transformers."""

import subprocess
import sys
from pathlib import Path

import pytest

from efficientsam3_hf import zoo

# Every order in which a user may import things; each has broken a plugin before.
ORDERS = {
    "plugin first": "import efficientsam3_hf",
    "plugin before stock models": "import efficientsam3_hf; from transformers import Sam3Model",
    "plugin before stock configurations": (
        "import efficientsam3_hf; from transformers import Sam3LiteTextConfig, Sam3VideoModel"
    ),
    "plugin before a stock image processor": (
        "import efficientsam3_hf; from transformers import Sam3ImageProcessor"
    ),
    "own model first": "from efficientsam3_hf import EfficientSam3Model",
    "own image processor first": "from efficientsam3_hf import EfficientSam3ImageProcessor",
    "auto classes first": (
        "from transformers import AutoModel, AutoProcessor; import efficientsam3_hf"
    ),
    "own pipeline first": "from efficientsam3_hf import PromptableConceptSegmentationPipeline",
    "everything first": (
        "from transformers import Sam3VideoModel, pipeline; import efficientsam3_hf"
    ),
}
USE = """
import sys, torch
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration,
    AutoModelForZeroShotObjectDetection, AutoProcessor
)
from transformers.pipelines import check_task
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder)
with torch.device("meta"):
    print(type(AutoModel.from_config(config)).__name__)
    print(type(AutoModelForMaskGeneration.from_config(config)).__name__)
    print(type(AutoModelForZeroShotObjectDetection.from_config(config)).__name__)
print(type(AutoProcessor.from_pretrained(folder)).__name__)
print(type(AutoImageProcessor.from_pretrained(folder)).__name__)
print(check_task("promptable-concept-segmentation")[1]["impl"].__name__)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A variant's folder without weights."""
    return zoo.save("efficientsam3-efficientvit-s", tmp_path_factory.mktemp("variant"))


def run(code: str, *arguments: str) -> str:
    """Output of a fresh interpreter."""
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.parametrize("order", ORDERS)
def test_auto_classes_know_the_family_in_whatever_order_things_are_imported(order: str, folder):
    assert run(ORDERS[order] + USE, str(folder)).split() == [
        "EfficientSam3Model",
        "EfficientSam3TrackerModel",
        "EfficientSam3Model",
        "EfficientSam3Processor",
        "EfficientSam3ImageProcessor",
        "PromptableConceptSegmentationPipeline",
    ]


def test_importing_the_package_imports_neither_torch_nor_transformers():
    heavy = "[m for m in ('torch', 'transformers', 'timm', 'torchvision') if m in sys.modules]"

    assert run(f"import sys, efficientsam3_hf; print({heavy})").strip() == "[]"


def test_public_names_are_found_when_asked_for():
    code = "import efficientsam3_hf as e; print(all(getattr(e, n) for n in e.__all__), dir(e)[0])"

    assert run(code).split() == ["True", "EfficientSam3Backbone"]


def test_a_name_that_does_not_exist_is_an_attribute_error():
    code = "import efficientsam3_hf as e; print(hasattr(e, 'EfficientSam4Model'))"

    assert run(code).strip() == "False"


def test_the_import_hook_removes_itself():
    code = (
        "import sys, efficientsam3_hf; from transformers import AutoProcessor, pipeline; "
        "print([f for f in sys.meta_path if type(f).__module__.startswith('efficientsam3')])"
    )

    assert run(code).strip() == "[]"
