"""What a training step of the supernet costs, in time and memory, beside one of its largest network trained alone.

    python benchmarks/supernet_step.py --space yolov8n --imgsz 320 --batch 16

The two train side by side, each in a process of its own, and take turns: a few steps here, a few steps there. Both see
the same invented images and have the same loss, optimizer, moving average and precision. Memory is what a process takes
beyond what Python and its libraries take, at its peak; on a GPU, what is allocated there. Run it on a machine that does
nothing else.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import nn
from ultralytics.utils.loss import v8DetectionLoss

from yolov8_nas.device.profile import available_cores
from yolov8_nas.space import SearchSpace
from yolov8_nas.supernet.autobatch import invented_batch
from yolov8_nas.supernet.derive import build
from yolov8_nas.supernet.distributed import Processes
from yolov8_nas.supernet.images import settings
from yolov8_nas.supernet.learner import GRADIENT_NORM, WEIGHT_DECAY, Learner, draw
from yolov8_nas.supernet.supernet import Supernet

KINDS = ("supernet", "largest alone")
CLASSES = 3
BOXES = 8
LR = 1e-4
GOAL_TIME, GOAL_MEMORY = 3.5, 1.3


def main() -> None:
    """Parse arguments; then be one of the two, or let them take turns and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--space", default="yolov8n")
    parser.add_argument("--imgsz", type=int, default=320)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--random-networks", type=int, default=2, help="beside the largest and the smallest")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=3, help="steps of each in a round")
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--kind", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        take_part(arguments)
    else:
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Start both, let them take turns, print."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads)}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--kind", kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for kind in KINDS
    ]

    def ask(process: subprocess.Popen[str], question: str) -> float:
        assert process.stdin and process.stdout
        process.stdin.write(question + "\n")
        process.stdin.flush()
        return float(json.loads(process.stdout.readline()))

    try:
        for process in processes:
            ask(process, "go")  # warm-up
        seconds = np.zeros((arguments.rounds, 2))
        for i in range(arguments.rounds):
            for j in (0, 1) if i % 2 else (1, 0):
                seconds[i, j] = ask(processes[j], "go") / arguments.steps
        memory = [ask(process, "peak") for process in processes]
    finally:
        for process in processes:
            process.kill()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{arguments.threads} CPU threads"
    print(
        f"space {arguments.space}, {arguments.imgsz} px, batch {arguments.batch}, "
        f"{2 + arguments.random_networks} networks a step, {device}"
    )
    for kind, step, most in zip(KINDS, np.median(seconds, axis=0), memory, strict=True):
        print(f"{kind:>14}: {step:.3f} s a step, {most / 2**20:.0f} MiB")
    ratios = seconds[:, 0] / seconds[:, 1]
    draws = np.random.default_rng(0).choice(ratios, (1000, len(ratios)))
    low, high = np.quantile(np.median(draws, axis=1), (0.025, 0.975))
    tell("time", float(np.median(ratios)), GOAL_TIME, f" [{low:.2f}, {high:.2f}]")
    tell("memory", memory[0] / memory[1], GOAL_MEMORY)


def tell(what: str, ratio: float, goal: float, interval: str = "") -> None:
    """Print a ratio beside its goal."""
    print(f"{what}: {ratio:.2f}{interval} times, the goal is at most {goal}: {'met' if ratio <= goal else 'missed'}")


def take_part(arguments: argparse.Namespace) -> None:
    """Be one of the two: take steps and tell how long they took, or tell the peak of memory."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(arguments.threads)
    peak(device)  # that of the imports
    before = peak(device)
    make = supernet_step if arguments.kind == KINDS[0] else plain_step
    step = make(arguments, device)
    for question in sys.stdin:
        if question.strip() == "peak":
            answer = peak(device) - before
        else:
            start = time.perf_counter()
            for _ in range(arguments.steps):
                step()
            answer = time.perf_counter() - start
        print(json.dumps(answer), flush=True)


def supernet_step(arguments: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """A step of `training.train`."""
    supernet = Supernet(SearchSpace.load(arguments.space), CLASSES).to(device)
    learner = Learner(supernet, Processes(device), imgsz=arguments.imgsz, accumulate=1, amp="auto")
    rng = np.random.default_rng(0)

    def step() -> None:
        batch = invented_batch(arguments.batch, arguments.imgsz, BOXES, device)
        learner.backward(batch, draw(supernet, arguments.random_networks, rng), arguments.batch)
        learner.update(1000, LR)

    return step


def plain_step(arguments: argparse.Namespace, device: torch.device) -> Callable[[], object]:
    """A step of the largest network as a stock model."""
    network = build(SearchSpace.load(arguments.space).largest(), CLASSES).to(device).train()
    network = network.to(memory_format=torch.channels_last)
    network.args = settings(arguments.imgsz)
    criterion = v8DetectionLoss(network)
    average = copy.deepcopy(network).requires_grad_(False)
    weights = [p for p in network.parameters() if p.requires_grad]
    averages = [p for p, q in zip(average.parameters(), network.parameters(), strict=True) if q.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    cuda = device.type == "cuda"
    half = torch.bfloat16 if not cuda or torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    scaler = torch.amp.GradScaler(device.type, enabled=cuda and half is torch.float16)

    def step() -> None:
        batch = invented_batch(arguments.batch, arguments.imgsz, BOXES, device)
        with torch.autocast(device.type, half, enabled=cuda):
            outputs = network(batch["img"])
        outputs = {name: v.float() if torch.is_tensor(v) else [f.float() for f in v] for name, v in outputs.items()}
        scaler.scale(criterion(outputs, batch)[0].sum()).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(weights, GRADIENT_NORM).item()  # waits for the device, as the supernet's step does
        scaler.step(optimizer)
        scaler.update()
        torch._foreach_lerp_(averages, weights, 1e-3)
        optimizer.zero_grad(set_to_none=True)

    return step


def peak(device: torch.device) -> int:
    """Peak of memory in bytes since this was last asked: of the process, or on the GPU."""
    if device.type == "cuda":
        allocated = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return allocated
    lines = Path("/proc/self/status").read_text().splitlines()
    Path("/proc/self/clear_refs").write_text("5")  # begins a new peak, from what is resident now
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    main()
