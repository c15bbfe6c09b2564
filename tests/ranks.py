"""Processes beside the tests: several of one run, and such as are killed; on CPU.

They are forked from a server that has imported the package, since importing it takes longer than
most of what they do.
"""

import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["efficientsam3_hf.distillation.launch", "datasets"])


class Started:
    """A function that runs in a process of its own.

    Args:
        function: Of a module, as it is looked up by its name.
        arguments: For it.
        environment: Variables to be set.
    """

    def __init__(self, function: Callable[..., Any], *arguments: Any, **environment: str):
        self.folder = Path(tempfile.mkdtemp())
        self.output, self.errors = self.folder / "output", self.folder / "errors"
        self.process = SERVER.Process(
            target=run,
            args=(function, arguments, environment, str(self.output), str(self.errors)),
        )
        self.process.start()

    @property
    def is_running(self) -> bool:
        """Whether it has not ended."""
        return self.process.exitcode is None

    def kill(self) -> None:
        """End it as a power cut would, if it has not ended."""
        self.process.kill()
        self.process.join()
        shutil.rmtree(self.folder, ignore_errors=True)

    def finish(self, code: int = 0, timeout: float = 300) -> str:
        """Wait for its end, which must be this one; what it printed."""
        self.process.join(timeout)
        output, errors = (
            path.read_text() if path.exists() else "" for path in (self.output, self.errors)
        )
        if self.is_running:
            self.kill()
            raise TimeoutError(f"Not done after {timeout} seconds: {output}\n{errors}")
        shutil.rmtree(self.folder)
        ended = self.process.exitcode
        assert ended == code, f"It ended with {ended}.\n{output}\n{errors}"
        return output


def run(
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    output: str,
    errors: str,
) -> None:
    """What a process begins with."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    with (
        open(output, "w", buffering=1) as out,
        open(errors, "w", buffering=1) as err,
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        function(*arguments)


def of_several(rank: int, count: int, port: int) -> dict[str, str]:
    """The environment of one of several processes of a run."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }


def run_ranks(code: str, count: int = 2, arguments: tuple[str, ...] = ()) -> list[str]:
    """What ranks print that run some code side by side."""
    port = free_port()
    started = [
        Started(run_code, code, arguments, **of_several(rank, count, port)) for rank in range(count)
    ]
    try:
        return [each.finish() for each in started]
    finally:
        for each in started:
            each.kill()  # if another has failed


def run_code(code: str, arguments: tuple[str, ...]) -> None:
    """As `python -c` does."""
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})


def kill_itself() -> None:
    """End this process as a power cut would."""
    os.kill(os.getpid(), signal.SIGKILL)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
