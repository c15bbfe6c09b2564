"""Makes a folder one that Hugging Face's Inference Endpoints can serve."""

import os
import shutil
from pathlib import Path

# What the folder's code and `handler.py` import, beyond torch, which the service brings along.
REQUIREMENTS = (
    "transformers>=5.20,<6",
    "torchvision>=0.21",
    "timm>=1.0.15",
    "accelerate>=1.2",
    "Pillow",
    "numpy",
    "ftfy",
    "pycocotools",
)


def write_handler(folder: str | os.PathLike) -> Path:
    """Write `handler.py` and `requirements.txt` into a folder of weights.

    Lines that `requirements.txt` has already stay as they are.

    Args:
        folder: What `save_pretrained` or `zoo.save` wrote.

    Returns:
        The handler.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json: give a folder that save_pretrained wrote.")
    requirements = folder / "requirements.txt"
    lines = requirements.read_text().splitlines() if requirements.is_file() else []
    lines += [line for line in REQUIREMENTS if line not in lines]
    requirements.write_text("\n".join(lines) + "\n")
    return Path(shutil.copyfile(Path(__file__).with_name("handler.py"), folder / "handler.py"))
