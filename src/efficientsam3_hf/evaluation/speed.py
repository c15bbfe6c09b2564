"""Time of each stage with warm-up and percentiles, peaks of memory, parameters, operations.

watch = Stopwatch(device="cuda", warm_up=10)
for path in paths:
    with watch.stage("decode"):
        image = read(path)
    with watch.stage("model"):
        masks = segment(image)
    watch.lap()
print(watch.summary())
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from .units import Units, stack, weights_or_ones

PERCENTILES = (50, 90, 95, 99)
TOTAL = "total"


class Stopwatch:
    """Seconds of the stages of a run that is repeated.

    Args:
        device: What is waited for before the clock is read, so that queued work counts where it
            was asked for.
        warm_up: Laps that are run but not counted: compilation, caches, memory pools.
        clock: Returns seconds.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        warm_up: int = 3,
        clock: Callable[[], float] = perf_counter,
    ):
        self.device = torch.device(device)
        self.warm_up = warm_up
        self.clock = clock
        self.laps: list[dict[str, float]] = []
        self._current: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside; stages of one name in one lap add up."""
        if name == TOTAL:
            raise ValueError(f"{TOTAL!r} is the name of the sum of all stages: take another.")
        wait_for(self.device)
        start = self.clock()
        yield
        wait_for(self.device)
        self._current[name] = self._current.get(name, 0.0) + self.clock() - start

    def lap(self) -> None:
        """End one repetition."""
        if not self._current:
            raise ValueError("The lap has no stage: wrap what is timed in `with watch.stage(...)`.")
        self.laps.append({**self._current, TOTAL: sum(self._current.values())})
        self._current = {}

    def units(self) -> Units:
        """Seconds of each stage, one row for each lap after the warm-up."""
        if len(self.laps) <= self.warm_up:
            raise ValueError(
                f"{len(self.laps)} laps leave none after a warm-up of {self.warm_up}: run more."
            )
        return stack(self.laps[self.warm_up :])

    def summary(self) -> dict[str, float]:
        """`summarize` of all laps after the warm-up."""
        return summarize(self.units())


def summarize(units: Units, weights: np.ndarray | None = None) -> dict[str, float]:
    """Milliseconds of each stage, `stage/mean`, `stage/p50`, ...; and laps in a second, `rate`.

    Args:
        weights: Whole numbers: how often each lap counts.
    """
    times = weights_or_ones(weights, units).astype(int)
    summary = {}
    for stage, seconds in units.items():
        milliseconds = 1000 * np.repeat(seconds, times)
        summary[f"{stage}/mean"] = float(milliseconds.mean())
        for percent, value in zip(
            PERCENTILES, np.percentile(milliseconds, PERCENTILES), strict=True
        ):
            summary[f"{stage}/p{percent}"] = float(value)
    return summary | {"rate": 1000 / summary[f"{TOTAL}/mean"]}


def wait_for(device: torch.device) -> None:
    """Return when the device has done all that it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


@contextmanager
def memory_peak(device: str | torch.device = "cpu") -> Iterator[dict[str, float]]:
    """Most bytes in use while the block runs: `with memory_peak("cuda") as peak: ...`.

    Afterwards `peak["bytes"]` has the tensors of a CUDA device at their peak, or the resident
    memory of the whole process on a CPU; nan where the system does not tell.
    """
    device = torch.device(device)
    peak = {"bytes": float("nan")}
    if device.type == "cuda":
        wait_for(device)
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        wait_for(device)
        peak["bytes"] = float(torch.cuda.max_memory_allocated(device))
    elif device.type == "cpu":
        was_reset = _reset_resident_peak()
        yield peak
        if was_reset:
            peak["bytes"] = _resident_peak()
    else:
        yield peak


def count_parameters(module: torch.nn.Module) -> int:
    """Parameters of a module, shared ones once; statistics and tables are none."""
    return sum(parameter.numel() for parameter in module.parameters())


def count_operations(run: Callable[[], object]) -> int:
    """Floating-point operations of matrix products, convolutions and attention in one call.

    A multiplication and the addition after it are two operations.
    """
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def _reset_resident_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: see `man 5 proc`
    except OSError:
        return False
    return True


def _resident_peak() -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return 1024.0 * int(line.split()[1])
    return float("nan")
