"""Several processes of one run, on CPU."""

import os
import socket
import subprocess
import sys
from pathlib import Path


def run_ranks(code: str, count: int = 2, arguments: tuple[str, ...] = ()) -> list[str]:
    """What ranks print that run some code side by side."""
    tests = Path(__file__).parent
    source = os.pathsep.join([str(tests.parent / "src"), str(tests)])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(count):
        environment = {
            **os.environ,
            "PYTHONPATH": source,
            "OMP_NUM_THREADS": "1",
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "ACCELERATE_USE_CPU": "true",
        }
        command = [sys.executable, "-c", code, *arguments]
        started.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    try:
        outputs = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    for process, (_, errors) in zip(started, outputs, strict=True):
        assert process.returncode == 0, errors
    return [output for output, _ in outputs]
