"""Fixtures: a Hub on this machine, and processes that do not know the package."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http, close_session
from loopback_hub import LoopbackHub
from tiny import tiny_model, tiny_tracker

from efficientsam3_hf import EfficientSam3Model, EfficientSam3TrackerModel


@pytest.fixture(scope="session")
def hub_server() -> Iterator[LoopbackHub]:
    """The one server of all tests: its address is fixed when a fresh process starts."""
    with LoopbackHub() as server:
        yield server


@pytest.fixture
def hub(hub_server, monkeypatch, tmp_path) -> Iterator[LoopbackHub]:
    """The Hub as this process sees it, with an empty cache and the token of the owner."""
    url = hub_server.url
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # else uploads go to another service
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
    # Clients that were made when these modules were imported.
    monkeypatch.setattr(hf_api.api, "endpoint", url)
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    # The pauses between attempts.
    no_pause = SimpleNamespace(sleep=lambda seconds: None)
    monkeypatch.setattr(_http, "time", no_pause)
    monkeypatch.setattr(file_download, "time", no_pause)
    monkeypatch.setenv("HF_TOKEN", "hf_owner")
    yield hub_server
    close_session()
    hub_server.check()
    hub_server.clear()


class FreshProcesses:
    """Processes that have imported transformers, and cannot import the package.

    They are forked from one that is started once, since its imports take seconds.
    """

    def __init__(self, endpoint: str, folder: Path):
        self.folder = folder
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        environment = {
            **kept,
            "OMP_NUM_THREADS": "1",
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(folder / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_TOKEN": "hf_owner",
        }
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "without_package.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=folder,
            env=environment,
            text=True,
        )

    def run(self, function: str, *arguments: Any, **options: Any) -> Any:
        """What a function of `without_package.py` returns in a process of its own."""
        answer = self.folder / "answer.json"
        answer.unlink(missing_ok=True)
        job = {"function": function, "arguments": arguments, "options": options}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**job, "answer": str(answer)}, default=str) + "\n")
        self.process.stdin.flush()
        self.process.stdout.readline()
        result = json.loads(answer.read_text())
        assert "error" not in result, result["error"]
        return result["value"]

    def close(self) -> None:
        self.process.communicate(timeout=30)  # which ends its input


@pytest.fixture(scope="session")
def fresh(hub_server, tmp_path_factory) -> Iterator[FreshProcesses]:
    """Where to run what users run who have not installed the package."""
    processes = FreshProcesses(hub_server.url, tmp_path_factory.mktemp("fresh"))
    yield processes
    processes.close()


@pytest.fixture(scope="session")
def joint_tracker(model: EfficientSam3Model) -> EfficientSam3TrackerModel:
    """A tracker that shares the trunk of `model`, so that one folder holds both."""
    tracker = tiny_tracker()
    trunk = model.vision_encoder.backbone.state_dict()
    tracker.vision_encoder.backbone.load_state_dict(trunk)
    return tracker


@pytest.fixture
def new_model() -> EfficientSam3Model:
    """A concept model that a test may change."""
    return tiny_model()
