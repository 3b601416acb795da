"""Ten minutes on a GPU: what only a GPU can show, in the order of its worth. `make test-gpu` runs this.

    python tests/gpu/ten_minutes.py [--out runs/test-gpu] [--minutes 10] [--only PART] [--needs]

Each part has a limit of its own and is a process of its own, writes its figures as it goes, and says why it is skipped
where something is missing. Started again, it does what is not done yet. At the end stands a table for the README, also
in `OUT/table.md`. It ends with status 0 where something was measured and nothing failed.

`--needs` lists what a machine without network has to be given, with sizes. `--on-cpu` rehearses the parts that a CPU
can carry out, in miniature: their code runs, and their figures are worth nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("YOLO_AUTOINSTALL", "false")
os.environ.setdefault("YOLO_CONFIG_DIR", tempfile.mkdtemp(prefix="yolov8-nas-gpu-"))

import torch

from yolov8_nas.files import atomic_write, file_sha256, read_json, write_json

ROOT: Final = Path(__file__).parents[2]

WHEELS: Final = (
    ("requirements/dev.txt", "PyTorch of CUDA 13 and all else of .venv", "2.9 GB of wheels, 7 GB installed"),
    ("requirements/rtx.txt", "tensorrt-rtx-cu13-libs, tensorrt-rtx-cu13-bindings", "95.2 MB + 1.2 MB"),
    ("onnxruntime-gpu==1.31.1", "in place of onnxruntime, for its CUDA provider", "255.6 MB"),
    ("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", "beside onnxruntime or onnxruntime-gpu", "146.5 MB"),
    ("tensorrt-cu13 (10.x or 11.x)", "from NVIDIA, for the last part", "size not looked up"),
)
"""What is installed, for what, and how much is downloaded. No data set and no weights are needed."""


@dataclass(frozen=True)
class Sizes:
    """How much is done: the real thing, or a rehearsal in miniature."""

    gpu: bool
    space: str = "yolov8n"
    imgsz: int = 640
    networks: int = 60
    holdout: int = 20
    images: int = 256
    batch: int = 16

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.gpu else "cpu")


REHEARSAL: Final = Sizes(gpu=False, space="tiny", imgsz=64, networks=12, holdout=5, images=16, batch=4)


class Record:
    """The figures of a part, on disk after each of them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[list[str]] = []
        self.work = path.with_suffix("")
        self.work.mkdir(parents=True, exist_ok=True)

    def add(self, what: str, value: str) -> None:
        self.rows.append([what, value])
        print(f"  {what}: {value}", flush=True)
        write_json(self.path.with_suffix(".rows.json"), self.rows)


@dataclass(frozen=True)
class Part:
    """One part.

    Attributes:
        name: Its name.
        what: What it shows.
        limit_s: Seconds after which it is ended.
        run: Measures.
        lacks: What it needs beside a GPU and does not find, in words.
        on_cpu: Whether a CPU can rehearse it.
    """

    name: str
    what: str
    limit_s: int
    run: Callable[[Record, Sizes], None]
    lacks: Callable[[], list[str]] = list
    on_cpu: bool = False


SLOWER: Final = 10
"""Times a part's limit that a rehearsal on a CPU gets, which may have other work."""

LEAST_S: Final = 10.0
"""A part with less time than this does not begin."""


def no_gpu() -> list[str]:
    return [] if torch.cuda.is_available() else ["this machine has no NVIDIA GPU that PyTorch can use"]


def _module(module: str, wheel: str) -> list[str]:
    return [] if importlib.util.find_spec(module) else [f"{wheel} is not installed"]


# The parts ------------------------------------------------------------------------------------------------------------


def profile(record: Record, sizes: Sizes) -> None:
    from yolov8_nas.device.machine import look

    machine = look(note=lambda _: None)
    write_json(record.work / "machine.json", machine.to_dict())
    for device, roofline in machine.measured.items():
        if device.startswith("gpu") is sizes.gpu:
            tops = ", ".join(f"{name} {value:.3g}" for name, value in roofline.tops.items())
            record.add(f"memory bandwidth, {device}", f"{roofline.bandwidth_gbs:.0f} GB/s")
            record.add(f"matrix product, {device}", f"{tops} TOP/s")
    for device, why in machine.not_measured.items():
        record.add(f"not measured, {device}", why)


def probe(record: Record, sizes: Sizes) -> None:
    """The stage itself, on PyTorch, whose networks are replayed from CUDA graphs and need no engine."""
    from yolov8_nas.config import RunConfig
    from yolov8_nas.device.host import HostLock
    from yolov8_nas.runner.progress import Progress
    from yolov8_nas.runner.stage import StageContext
    from yolov8_nas.stages.hw_probe import STAGE

    hardware = torch.cuda.get_device_name() if sizes.gpu else "cpu-1t"
    target = {"hardware": hardware, "runtime": "torch", "precision": "fp16" if sizes.gpu else "fp32",
              "constraints": ["latency<=100%stock"]}  # fmt: skip
    networks = {"networks": sizes.networks, "holdout": sizes.holdout, "max_mape": 10.0}
    asked = {"space": sizes.space, "imgsz": sizes.imgsz, "probe": networks, "targets": [target]}
    config = RunConfig.parse(asked, "the script")
    settings = STAGE.whole(config, config.targets[0], {"num_classes": 80})
    out, partial = record.work / "out", record.work / "partial"
    for folder in (out, partial):
        folder.mkdir(exist_ok=True)
    STAGE.run(StageContext(settings, {}, out, partial, Progress("hw-probe"), HostLock()))
    model, stock = read_json(out / "latency_model.json"), read_json(out / "stock.json")
    record.add(f"stock network, {target['precision'].upper()}, p50", f"{stock['latency_ms']['p50']:.3f} ms")
    record.add(f"latency model of {model['networks']} networks, error on {model['holdout']} held out",
               f"{model['mape']:.1%}, Spearman {model['spearman']:.3f}")  # fmt: skip


def rtx_engines(record: Record, sizes: Sizes) -> None:
    from yolov8_nas.export.tensorrt_rtx import build_ahead
    from yolov8_nas.measure.runtime import random_feed
    from yolov8_nas.measure.tensorrt_rtx import RtxRunner, capability_here, missing_to_build, refusal

    if lacking := missing_to_build():
        record.add("TensorRT for RTX", f"not measured: {' and '.join(lacking)}")
        return
    card, capability = (torch.cuda.get_device_name(), capability_here()) if sizes.gpu else ("no card", "8.9")
    for precision, file in _files(record, sizes, ("fp32", "fp16", "int8")).items():
        if why_not := refusal(card, capability, precision):
            record.add(f"TensorRT for RTX, {precision.upper()}", why_not)
            continue
        engine = file.with_suffix(".rtx.engine")
        manifest = build_ahead(file, engine, capabilities=[capability])
        if not sizes.gpu:  # a rehearsal ends where the card begins
            record.add(f"TensorRT for RTX {manifest.built_on.tensorrt}, {precision.upper()}",
                       f"{manifest.layers['seconds']:.1f} s ahead of time; opened by nothing here")  # fmt: skip
            continue
        runner = RtxRunner(engine)
        (output,) = runner.run(None, random_feed(runner))
        runner.gpu_times(100)
        times = runner.gpu_times(1000)
        finite = "finite" if bool(torch.isfinite(torch.from_numpy(output)).all()) else "NOT FINITE"
        record.add(f"TensorRT for RTX {manifest.built_on.tensorrt}, {precision.upper()}, p50",
                   f"{statistics.median(times):.3f} ms ({manifest.layers['seconds']:.1f} s ahead of time, "
                   f"{runner.compiled_s:.1f} s just in time, outputs {finite})")  # fmt: skip


def providers(record: Record, sizes: Sizes) -> None:
    from yolov8_nas.measure.runtime import find

    files = _files(record, sizes, ("fp32", "fp16", "int8"))
    for name, runtime, precisions in (
        ("CUDA provider", "onnxruntime", ("fp32", "fp16")),
        ("TensorRT provider", "onnxruntime-tensorrt", ("fp16", "int8")),
    ):
        for precision in precisions:
            found = find(runtime, "gpu", precision)
            if why_not := found.why_not():
                record.add(f"ONNX Runtime's {name}", f"not measured: {why_not}")
                break
            _time_session(record, f"{name}, {precision.upper()}", found.open(files[precision], threads=1))
    _rtx_provider(record, files)


def _rtx_provider(record: Record, files: dict[str, Path]) -> None:
    if lacking := _module("onnxruntime_ep_nv_tensorrt_rtx", "onnxruntime-ep-nv-tensorrt-rtx-cu13"):
        record.add("ONNX Runtime's TensorRT for RTX provider", f"not measured: {lacking[0]}")
        return
    import onnxruntime as ort
    import onnxruntime_ep_nv_tensorrt_rtx as plugin

    name = plugin.get_ep_name()
    ort.register_execution_provider_library(name, plugin.get_library_path())
    devices = [device for device in ort.get_ep_devices() if device.ep_name == name]
    if not devices:
        record.add("ONNX Runtime's TensorRT for RTX provider", "not measured: it finds no device that it supports")
        return
    for precision, file in files.items():
        options = ort.SessionOptions()
        options.add_provider_for_devices(devices, {})
        _time_session(record, f"TensorRT for RTX provider, {precision.upper()}",
                      ort.InferenceSession(str(file), sess_options=options))  # fmt: skip


def _time_session(record: Record, what: str, session: Any) -> None:
    from yolov8_nas.measure.runtime import random_feed

    feed, times = random_feed(session), []
    for turn in range(350):
        start = time.perf_counter()
        session.run(None, feed)
        if turn >= 50:
            times.append(1000 * (time.perf_counter() - start))
    record.add(f"ONNX Runtime, {what}, p50 with copies", f"{statistics.median(times):.3f} ms")


def int8_against_fp16(record: Record, sizes: Sizes) -> None:
    """In alternating rounds, by every runtime that has both and is here."""
    from yolov8_nas.device.host import HostLock
    from yolov8_nas.export.artifact import write_network
    from yolov8_nas.measure.benchmark import measure
    from yolov8_nas.measure.runtime import find

    network = _network(sizes)
    for name in ("tensorrt-rtx", "tensorrt", "onnxruntime-tensorrt"):
        p50 = {}
        for precision in ("fp16", "int8"):
            runtime = find(name, "gpu", precision)
            if why_not := runtime.why_not():
                record.add(f"INT8 against FP16, {name}", f"not measured: {why_not}")
                break
            file = record.work / f"{name}-{precision}{runtime.suffix}"
            images = [torch.rand(4, 3, sizes.imgsz, sizes.imgsz)]
            write_network(network, file, runtime=runtime, imgsz=sizes.imgsz, calibration=images)
            with HostLock().measuring():
                (one,) = measure([file], threads=1, runtime=runtime)
            p50[precision] = one.latency_ms.p50
        if len(p50) == 2:
            record.add(f"INT8 against FP16, {name}",
                       f"{p50['int8']:.3f} against {p50['fp16']:.3f} ms: {p50['int8'] / p50['fp16']:.2f}")  # fmt: skip


def training(record: Record, sizes: Sizes) -> None:
    """The training loop itself, with its data loader, for two epochs."""
    import detection

    from yolov8_nas.data.dataset import data_yaml
    from yolov8_nas.runner.progress import Progress
    from yolov8_nas.space import SearchSpace
    from yolov8_nas.supernet.distributed import Processes
    from yolov8_nas.supernet.supernet import Supernet
    from yolov8_nas.supernet.training import Recipe, _Validation, train

    _Validation.run = lambda self, supernet: {}  # type: ignore[method-assign]  # scoring is not what is timed
    folder = record.work / "data"
    if not folder.exists():
        detection.make_dataset(folder, train=sizes.images, search=8, val=8, size=sizes.imgsz)
    data = data_yaml(folder, record.work / "view", validate_on="search")
    supernet = Supernet(SearchSpace.load(sizes.space), 2, detection.CLASSES)
    recipe = Recipe(imgsz=sizes.imgsz, epochs=3, batch=sizes.batch, lr=1e-3, random_networks=2, seed=0, largest_first=0)
    processes = Processes(sizes.device)
    with tempfile.TemporaryDirectory() as work:
        _, curves = train(supernet.to(sizes.device), data, recipe, Path(work), Progress.silent(), processes)
    last = curves[-1]  # the first ones read the images and choose kernels
    speed, waiting = sizes.images / last["seconds"], last["data_seconds"] / last["seconds"]
    what = f"supernet {sizes.space}, {sizes.imgsz} px, batch {sizes.batch}, 4 networks a step, mixed precision"
    record.add(what, f"{speed:.0f} images/s, {waiting:.0%} of the time waiting for images")
    if sizes.gpu:
        record.add("its memory at the peak", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def nccl(record: Record, sizes: Sizes) -> None:
    """What `tests/test_distributed.py` does with two processes on a CPU: gradients that each of two cards averages."""
    code = """
import torch, torch.distributed as d
d.init_process_group("nccl")
rank = d.get_rank()
torch.cuda.set_device(rank)
tensor = torch.full((2**24,), float(rank + 1), device="cuda")
d.all_reduce(tensor)
assert (tensor == 3).all()
start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
start.record()
for _ in range(20):
    d.all_reduce(tensor)
end.record()
torch.cuda.synchronize()
print(start.elapsed_time(end) / 20 if rank == 0 else "", flush=True)
d.destroy_process_group()
"""
    script = record.work / "reduce.py"
    script.write_text(code)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    record.add("all-reduce of 64 MiB over two cards, NCCL", f"{float(done.stdout.split()[0]):.2f} ms")


def two_cards() -> list[str]:
    count = torch.cuda.device_count()
    return [] if count >= 2 else [f"NCCL with two processes takes two cards, and {count or 'none'} is here"]


def analysis(record: Record, sizes: Sizes) -> None:
    from yolov8_nas.analysis.run import analyze

    hardware = torch.cuda.get_device_name() if sizes.gpu else "cpu-1t"
    found = analyze(
        _checkpoint(record, sizes), hardware=hardware, runtime="torch", precision="fp16" if sizes.gpu else "fp32",
        imgsz=sizes.imgsz, batches=[1], streams=[1], fps=25.0, size=(1280, 720), images=None, rows_of=None,
        progress=record.work / "progress",
    )  # fmt: skip
    write_json(record.work / "analysis.json", json.loads(json.dumps(found.to_dict(), default=str)))
    record.add("analyze: a frame, p50", f"{found.frame.whole.latency_ms.p50:.2f} ms")
    if found.trace is None:
        record.add("analyze: launches", "not told by this runtime")
    else:
        slowest = max(found.trace.operators, key=lambda operator: operator.ms)
        record.add("analyze: launches", f"{found.trace.launches} {found.trace.launched} a frame")
        record.add("analyze: the slowest operator", f"{slowest.kind} of {slowest.layer}, {slowest.ms:.3f} ms")
    for way, ms in found.copies_ms.items():
        record.add(f"analyze: copy {way}", f"{ms:.3f} ms")


def tensorrt(record: Record, sizes: Sizes) -> None:
    """Engines of TensorRT 10 or 11, refusals, NMS, caches: `engines.py`, whose tests skip nothing."""
    command = [sys.executable, "-m", "pytest", "-q", "-s", str(Path(__file__).with_name("engines.py"))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    atomic_write(record.work / "engines.txt", (done.stdout + done.stderr).encode())
    verified = [line for line in done.stdout.splitlines() if line.startswith("verified: ")]
    record.add("TensorRT 10 or 11: verified", str(len(verified)))
    if done.returncode:
        raise RuntimeError(f"engines.py failed: {done.stdout.splitlines()[-1] if done.stdout else done.stderr}")


def no_tensorrt() -> list[str]:
    from yolov8_nas.measure.tensorrt import missing

    return missing()


def no_rtx() -> list[str]:
    from yolov8_nas.measure.tensorrt_rtx import missing

    return missing()


PARTS: Final = (
    Part("profile", "what the card can do at most", 60, profile, on_cpu=True),
    Part("probe", "latency in FP16 through CUDA graphs, and the latency model's error", 180, probe, on_cpu=True),
    Part("rtx-engines", "engines built by TensorRT for RTX", 60, rtx_engines, no_rtx, on_cpu=True),
    Part("providers", "ONNX Runtime's CUDA, TensorRT and TensorRT for RTX providers", 90, providers),
    Part("int8", "INT8 against FP16", 60, int8_against_fp16),
    Part("training", "the supernet's training in mixed precision", 120, training, on_cpu=True),
    Part("nccl", "two processes under NCCL", 45, nccl, two_cards),
    Part("analyze", "launches and copies of a frame", 60, analysis, on_cpu=True),
    Part("tensorrt", "engines of TensorRT 10 or 11", 240, tensorrt, no_tensorrt),
)
"""In the order of their worth: what comes last is what a short loan of a card does not reach."""


# What they measure ----------------------------------------------------------------------------------------------------


def _network(sizes: Sizes) -> Any:
    """The demo's best where a run is there, else stock YOLOv8n with fresh weights, which takes as long."""
    from ultralytics.nn.tasks import load_checkpoint

    from yolov8_nas.space import stock_architecture
    from yolov8_nas.supernet.derive import build

    demo = sorted((ROOT / "runs" / "demo" / "models").glob("*/best.pt"))
    if demo:
        return load_checkpoint(demo[0], device="cpu")[0].float().eval()
    torch.manual_seed(0)
    return build(stock_architecture("n"), 80).eval()


def _files(record: Record, sizes: Sizes, precisions: Sequence[str]) -> dict[str, Path]:
    from yolov8_nas.export.artifact import write_onnx
    from yolov8_nas.measure.runtime import find
    from yolov8_nas.train.quantization import quantize

    found = {}
    for precision in precisions:
        found[precision] = record.work / f"{precision}.onnx"
        network = _network(sizes)
        if precision == "int8":
            network = quantize(network, [torch.rand(4, 3, sizes.imgsz, sizes.imgsz)])
        if not found[precision].exists():
            runtime = find("tensorrt-rtx", "gpu", precision)
            write_onnx(network, found[precision], runtime=runtime, imgsz=sizes.imgsz)
    return found


def _checkpoint(record: Record, sizes: Sizes) -> Path:
    from yolov8_nas.supernet.derive import save_checkpoint

    file, network = record.work / "network.pt", _network(sizes)
    save_checkpoint(network, file, names=[str(name) for name in network.names.values()], imgsz=sizes.imgsz)
    return file


# Running them ---------------------------------------------------------------------------------------------------------


def main() -> int:
    """Parse arguments; then be a part, list what is needed, or run what is not done yet and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "test-gpu")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", choices=[part.name for part in PARTS], action="append")
    parser.add_argument("--needs", action="store_true")
    parser.add_argument("--on-cpu", action="store_true")
    parser.add_argument("--part", choices=[part.name for part in PARTS], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    out: Path = arguments.out.absolute()
    if arguments.needs:
        for wheel, what, size in WHEELS:
            print(f"{wheel}: {what} ({size})")
        return 0
    if arguments.part:
        (part,) = (part for part in PARTS if part.name == arguments.part)
        part.run(Record(out / f"{part.name}.json"), REHEARSAL if arguments.on_cpu else Sizes(gpu=True))
        return 0
    out.mkdir(parents=True, exist_ok=True)
    chosen = [part for part in PARTS if not arguments.only or part.name in arguments.only]
    results = run(chosen, out, seconds=60 * arguments.minutes, on_cpu=arguments.on_cpu)
    table = tell(chosen, results, on_cpu=arguments.on_cpu)
    atomic_write(out / "table.md", table.encode())
    print(f"\n{table}")
    statuses = {result["status"] for result in results.values()}
    return 0 if "done" in statuses and not statuses & {"failed", "out of time"} else 1


def run(parts: Sequence[Part], out: Path, *, seconds: float, on_cpu: bool) -> dict[str, dict[str, Any]]:
    """Run parts that are not done yet, within the time; each result is written as it comes."""
    end = time.monotonic() + seconds
    results = {}
    for part in parts:
        file = out / f"{part.name}.json"
        kept = _kept(file, on_cpu)
        result = kept or _run(part, file, end - time.monotonic(), on_cpu)
        result |= {"script": file_sha256(Path(__file__)), "machine": machine(), "on_cpu": on_cpu}
        write_json(file, result)
        results[part.name] = result
        why = f": {result['why']}" if result["why"] else ""
        print(f"{part.name}: {'done before' if kept else result['status']}{why}", flush=True)
    return results


def _kept(file: Path, on_cpu: bool) -> dict[str, Any] | None:
    """What is done already, by this script on this card."""
    if not file.is_file():
        return None
    result: dict[str, Any] = read_json(file)
    same = (result.get("script"), result.get("machine"), result.get("on_cpu"))
    done = result.get("status") == "done" and same == (file_sha256(Path(__file__)), machine(), on_cpu)
    return result if done else None


def _run(part: Part, file: Path, left: float, on_cpu: bool) -> dict[str, Any]:
    lacking = ([] if part.on_cpu else ["a CPU cannot rehearse it"]) if on_cpu else [*no_gpu(), *part.lacks()]
    if lacking:
        return _result("skipped", " and ".join(dict.fromkeys(lacking)))
    limit = min(part.limit_s * (SLOWER if on_cpu else 1), left)
    if limit < LEAST_S:
        return _result("skipped", "the time was used up by the parts before it; start it again")
    print(f"{part.name}: {part.what}, at most {limit:.0f} s", flush=True)
    command = [sys.executable, __file__, "--part", part.name, "--out", str(file.parent)]
    rows, start = file.with_suffix(".rows.json"), time.monotonic()
    rows.unlink(missing_ok=True)
    status, why = "done", ""
    log = file.with_suffix(".log")
    with log.open("w") as told:
        process = subprocess.Popen(
            [*command, *(["--on-cpu"] if on_cpu else [])], stdout=told, stderr=subprocess.STDOUT, cwd=ROOT
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            status, why = "out of time", f"it took more than {limit:.0f} s; start it again"
    if status == "done" and process.returncode:
        last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        status, why = "failed", f"{last[0] if last else 'no message'} ({log})"
    return _result(status, why, read_json(rows) if rows.is_file() else [], time.monotonic() - start)


def _result(status: str, why: str, rows: Sequence[Any] = (), seconds: float = 0.0) -> dict[str, Any]:
    return {"status": status, "why": why, "rows": list(rows), "seconds": round(seconds, 1)}


def machine() -> str:
    """The card and the software above it."""
    if not torch.cuda.is_available():
        return "no GPU"
    gpu = torch.cuda.get_device_properties(0)
    return f"{gpu.name} ({gpu.major}.{gpu.minor}), PyTorch {torch.__version__}, CUDA {torch.version.cuda}"


def tell(parts: Sequence[Part], results: dict[str, dict[str, Any]], *, on_cpu: bool) -> str:
    """The table, ready for the README."""
    head = (
        "Rehearsed in miniature on a CPU: the figures are worth nothing" if on_cpu else f"`make test-gpu`, {machine()}"
    )
    lines = [f"{head}.", "", "| what | value |", "|---|---|"]
    for part in parts:
        result = results[part.name]
        lines += [f"| {what} | {value} |" for what, value in result["rows"]]
        if result["status"] != "done":
            lines.append(f"| {part.what} | *not measured* ({result['status']}): {result['why']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
