"""Helpers of all benchmarks: timing in turns, peak memory, rows of tables, the machine."""

import ctypes
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
HEADER = "| | official | ours | ratio |\n| --- | --- | --- | --- |"


def machine() -> str:
    """Return the processor or GPU, the number of threads, versions and the date, in one line."""
    name = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        for line in cpu_info.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":")[1].strip()
                break
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"

    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}"


def set_up_torch(args) -> None:
    """Set the number of threads and turn TF32 off. Raise ValueError if --device has no GPU."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out for the CPU")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False


def now() -> float:
    """Return the time in seconds, after all work queued on the GPU is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(steps: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each step in each round, after one round of warm-up.

    The steps alternate, so that a busy machine slows all of them alike.
    """
    seconds = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name, step in steps.items():
            start = now()
            step()
            if round > 0:  # round 0 is the warm-up
                seconds[name].append(now() - start)
    return seconds


def process_memory(field: str) -> int:
    """Return a field of /proc/self/status in KiB, such as VmRSS (current) or VmHWM (peak)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {field}")


def peak_memory(step: Callable) -> float:
    """Return how much a step's peak memory exceeds the memory before it, in MB.

    On the CPU this needs Linux.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    # Return freed memory to the system: the step would use it again, and so seem to need less.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak

    before = process_memory("VmRSS")
    step()
    return (process_memory("VmHWM") - before) * 1024 / 1e6


def in_fresh_process(*arguments: str) -> float:
    """Run this program again with additional arguments. Return the number on its last line."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def cell(values: list[float]) -> str:
    """Return the median, and the range if there are several values."""
    median = f"{statistics.median(values):.3g}"
    if len(values) == 1:
        return median
    return f"{median} ({min(values):.3g} to {max(values):.3g})"


def row(name: str, official: list[float], ours: list[float], unit: str) -> str:
    """Return a table row: both medians and ranges, and the official median divided by ours."""
    ratio = statistics.median(official) / statistics.median(ours)
    return f"| {name}, {unit} | {cell(official)} | {cell(ours)} | {ratio:.2f} |"


def print_memory_rows(kinds: Iterable[str]) -> None:
    """Print the peak memory of each kind of step.

    Each is measured in a fresh process of the benchmark, which gets --memory IMPLEMENTATION KIND.
    """
    for kind in kinds:
        official = in_fresh_process("--memory", "official", kind)
        ours = in_fresh_process("--memory", "ours", kind)
        print(row(f"peak memory, {kind}", [official], [ours], "MB"), flush=True)
