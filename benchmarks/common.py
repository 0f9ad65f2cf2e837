"""What comparisons with official implementations share: turns, memory, tables, the machine."""

import ctypes
import datetime
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """Processor or GPU, threads, versions and date, in one line."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), name)
    if torch.cuda.is_available():
        name = f"{torch.cuda.get_device_name()}, {name}"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads, {versions}, {datetime.date.today()}"


def settle(args) -> None:
    """Threads, and full float32. ValueError: a GPU that is not there."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no GPU here; leave it out for the CPU")
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False


def now() -> float:
    """Seconds, once the GPU has done all that it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def in_turns(steps: dict[str, Callable], rounds: int) -> dict[str, list[float]]:
    """Seconds of each step in each round; they alternate: a busy machine slows all alike."""
    seconds = {name: [] for name in steps}
    for round in range(rounds + 1):
        for name, step in steps.items():
            start = now()
            step()
            if round > 0:  # the first one warms up
                seconds[name].append(now() - start)
    return seconds


def peak_memory(step: Callable) -> float:
    """MB that a step takes at its peak over what there was before. On the CPU this needs Linux."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return (torch.cuda.max_memory_allocated() - before) / 1e6

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(x.split()[1] for x in lines if x.startswith(field)))  # KiB

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would hide what the step takes
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew from here
    before = status("VmRSS")
    step()
    return (status("VmHWM") - before) * 1024 / 1e6


def in_fresh_process(*arguments: str) -> float:
    """Runs this very program again with further arguments; the number that it prints last."""
    command = [sys.executable, *sys.argv, *arguments]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(what: str, official: list[float], ours: list[float], unit: str) -> str:
    """Medians, the range of each, and by how much the official median is larger."""

    def show(values: list[float]) -> str:
        low, mid, high = min(values), statistics.median(values), max(values)
        return f"{mid:.3g}" + (f" ({low:.3g} to {high:.3g})" if len(values) > 1 else "")

    ratio = statistics.median(official) / statistics.median(ours)
    return f"| {what}, {unit} | {show(official)} | {show(ours)} | {ratio:.2f} |"


def memory_rows(kinds) -> None:
    """Prints the peak memory of each kind of step, each in a fresh process that gets --memory."""
    for kind in kinds:
        peak = {name: [in_fresh_process("--memory", name, kind)] for name in ("official", "ours")}
        print(row(f"peak memory, {kind}", peak["official"], peak["ours"], "MB"), flush=True)


HEADER = "| | official | ours | ratio |\n| --- | --- | --- | --- |"
