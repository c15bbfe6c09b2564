# ruff: noqa: E402  first the package is made absent
"""What users do who have transformers and its friends, but not this package.

Run as a program, it imports what takes long, then serves jobs, one a line on standard input: each
is a function of this file, called in a forked process. Nothing of one job is left for the next but
files.
"""

import copy
import importlib.abc
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

PACKAGES_NOT_INSTALLED = {"efficientsam3_hf"}


class NotInstalled(importlib.abc.MetaPathFinder):
    """Makes packages look as if they were not installed."""

    def find_spec(self, fullname: str, path=None, target=None) -> None:
        if fullname.split(".")[0] in PACKAGES_NOT_INSTALLED:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


sys.path = [path for path in sys.path if not (Path(path) / "efficientsam3_hf").exists()]
sys.meta_path.insert(0, NotInstalled())

# Some of these are here only because each job would have to import them.
import ftfy  # noqa: F401
import huggingface_hub
import timm  # noqa: F401
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.clip import tokenization_clip  # noqa: F401
from transformers.models.sam3 import modeling_sam3, processing_sam3  # noqa: F401
from transformers.models.sam3.image_processing_sam3 import Sam3ImageProcessor  # noqa: F401
from transformers.models.sam3_lite_text import modeling_sam3_lite_text  # noqa: F401
from transformers.models.sam3_tracker import modeling_sam3_tracker  # noqa: F401

torch.set_num_threads(1)


def can_import(package: str) -> bool:
    try:
        __import__(package)
    except ModuleNotFoundError:
        return False
    return True


def load(auto_class: str, source: str, **options: Any) -> Any:
    """Something out of a folder or repository, its code trusted."""
    auto = getattr(transformers, auto_class)
    return auto.from_pretrained(source, **{"trust_remote_code": True, **options})


def compute(auto_class: str, source: str, inputs: str, outputs: str, **options: Any) -> list[str]:
    """Run a model, write its outputs, and return the name and module of its class."""
    model = load(auto_class, source, **options)
    return run(model, inputs, outputs)


def run(model: Any, inputs: str, outputs: str) -> list[str]:
    """Write what a model computes, and return the name and module of its class."""
    # A copy, since a mapped file is not aligned as torch likes it, and BLAS then rounds apart.
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        results = model(**load_file(inputs))
    tensors = {name: value for name, value in results.items() if isinstance(value, torch.Tensor)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, outputs)
    return [type(model).__name__, type(model).__module__]


def process(source: str, outputs: str, **options: Any) -> dict[str, str]:
    """Run every processor of a folder; their inputs are the tests' own."""
    processor = load("AutoProcessor", source, **options)
    image_processor = load("AutoImageProcessor", source, **options)
    tokenizer = load("AutoTokenizer", source, **options)
    tracker_processor = get_class_from_dynamic_module(
        "remote_code.EfficientSam3TrackerProcessor", source, **options
    ).from_pretrained(source, trust_remote_code=True, **options)
    image = (torch.arange(3 * 40 * 60) % 251).reshape(3, 40, 60).to(torch.uint8)
    box = [[[1.0, 2.0, 30.0, 35.0]]]
    encoding = dict(processor(images=image, text="a red car", input_boxes=box))
    encoding["image_processor"] = image_processor(image, return_tensors="pt")["pixel_values"]
    encoding["tracker_boxes"] = tracker_processor(images=image, input_boxes=box)["input_boxes"]
    save_file(
        {name: torch.as_tensor(value).contiguous() for name, value in encoding.items()}, outputs
    )
    parts = {
        "processor": processor,
        "its image processor": processor.image_processor,
        "image processor": image_processor,
        "tokenizer": tokenizer,
        "tracker's processor": tracker_processor,
    }
    return {name: type(part).__name__ for name, part in parts.items()}


def execute(code: str) -> dict[str, str]:
    """Run code, and return the modules of the classes of what it leaves."""
    names: dict[str, Any] = {}
    exec(code, names)
    return {name: type(value).__module__ for name, value in names.items() if name[0] != "_"}


def configuration(source: str, **options: Any) -> dict[str, Any]:
    """A configuration, its class, and those of its parts."""
    config = load("AutoConfig", source, **options)
    parts = {name: type(getattr(config, name)).__module__ for name in config.sub_configs}
    return {"class": type(config).__name__, "values": config.to_diff_dict(), "parts": parts}


def save_again(auto_classes: dict[str, str], source: str) -> None:
    """Load things and save each into a folder."""
    for auto_class, folder in auto_classes.items():
        load(auto_class, source).save_pretrained(folder)


def push_again(auto_class: str, source: str, repository: str) -> None:
    load(auto_class, source).push_to_hub(repository)


def copies_of_the_configuration(*sources: str) -> list[str]:
    """Modules of configurations after everything of some folders has been loaded."""
    for source in sources:
        for auto_class in ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor"):
            load(auto_class, source)
        load("AutoModelForMaskGeneration", source)
    return [name for name in sys.modules if name.endswith(".configuration_efficientsam3")]


def error_without(package: str, source: str) -> str:
    """What is said where a package is not installed."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    PACKAGES_NOT_INSTALLED.add(package)
    return error("AutoModel", source)


def error(auto_class: str, source: str, **options: Any) -> str:
    """What is said when something cannot be loaded."""
    try:
        load(auto_class, source, **options)
    except Exception as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


def compute_offline(auto_class: str, source: str, inputs: str, outputs: str) -> list[str]:
    """Run a model that has been loaded before, without a network."""
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    return compute(auto_class, source, inputs, outputs)


def serve() -> None:
    """Run each job in a process of its own."""
    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            sys.stdin = open(os.devnull)  # noqa: SIM115  a question to the user gets no answer
            os.dup2(2, 1)  # standard output is for the one who waits
            try:
                value = globals()[job["function"]](*job["arguments"], **job["options"])
                result = {"value": value}
            except BaseException:
                result = {"error": traceback.format_exc()}
            Path(job["answer"]).write_text(json.dumps(result))
            os._exit(0)
        os.waitpid(child, 0)
        print("done", flush=True)


if __name__ == "__main__":
    serve()
