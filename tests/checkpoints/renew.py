"""Write checkpoints of YOLOv8n with many versions of Ultralytics, for `tests/test_old_checkpoints.py`.

    python tests/checkpoints/renew.py WORKDIR

Each version is installed, without its dependencies, into a folder of its own below WORKDIR, beside the PyTorch of
this environment, and writes there what its own trainer, its own `strip_optimizer` and its own `fuse` write. No training
takes place: weights follow a pattern that compresses well, and the files are kept as `.xz`. Each version also writes
down what the network answers to an image, which is what the network that is read has to answer.

What old versions import and this environment lacks is installed beside them (`BESIDE`), or is an empty module where it
is not used for writing (`EMPTY`). Nothing of that is needed for reading.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import lzma
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

VERSIONS = ("8.0.0", "8.0.100", "8.1.0", "8.2.0", "8.3.0", "8.3.200", "8.4.190")
BESIDE = ("hydra-core==1.3.2", "omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3", "thop==0.1.1.post2209072238")
BESIDE += ("hub-sdk==0.0.8", "setuptools<81")
EMPTY = ("IPython", "seaborn", "tensorboard")
HERE = Path(__file__).parent
NAMES = ("platelets", "RBC", "WBC")
SIDE = 64
PROBES = 24
"""Scores that are written down."""


def main() -> None:
    """Install, write, compress."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--version", choices=VERSIONS, help="write with this version, installed already")
    given = parser.parse_args()
    work = given.work.resolve()
    if given.version:
        write(given.version, work / given.version / "written")
        return
    told: dict[str, Any] = {}
    for version in VERSIONS:
        packages, beside = work / version / "packages", work / "beside"
        for folder, wanted in ((beside, BESIDE), (packages, (f"ultralytics=={version}",))):
            if not folder.exists():
                run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wanted)
        path = os.pathsep.join(map(str, (packages, beside)))
        environment = {**os.environ, "PYTHONPATH": path, "YOLO_CONFIG_DIR": str(work / version), "YOLO_OFFLINE": "true"}
        run(sys.executable, __file__, str(work), "--version", version, env=environment)
        for file in sorted((work / version / "written").glob("*.pt")):
            data = file.read_bytes()
            (HERE / f"{version}-{file.stem}.pt.xz").write_bytes(lzma.compress(data, preset=9))
            told[f"{version}-{file.stem}.pt"] = {
                "sha256": hashlib.sha256(data).hexdigest(),
                **json.loads(file.with_suffix(".json").read_text()),
            }
    (HERE / "checkpoints.json").write_text(json.dumps(told, indent=1) + "\n")


def run(*command: str, env: dict[str, str] | None = None) -> None:
    """Run a command, and fail where it fails."""
    subprocess.run(command, check=True, env=env)


def write(version: str, folder: Path) -> None:
    """Write everything with the installed version; the checkpoints' names say what they are."""
    for name in EMPTY:
        try:
            importlib.import_module(name)
        except ImportError:
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].display = sys.modules[name].get_ipython = lambda *_: None  # type: ignore[attr-defined]
    import torch
    import ultralytics

    assert ultralytics.__version__ == version, ultralytics.__version__
    loaded = torch.load  # Ultralytics before PyTorch 2.6 did not say that its files hold objects; these are its own
    torch.load = lambda *args, **kwargs: loaded(*args, **{**kwargs, "weights_only": False})
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    network = built()
    trainer = trainer_of(network, folder)
    trainer.save_model()  # last.pt, and best.pt as it is the best
    strip_optimizer(folder / "best.pt")
    for name in ("last", "best"):
        tell(folder / f"{name}.pt", network)
    (folder / "best.pt").rename(folder / "stripped.pt")
    (folder / "best.json").rename(folder / "stripped.json")
    network = network.float().eval()
    torch.save({"epoch": -1, "model": network, "version": version, "train_args": {"imgsz": SIDE}}, folder / "fp32.pt")
    tell(folder / "fp32.pt", network)
    if version in ("8.0.0", "8.1.0", "8.3.200", "8.4.190"):
        network = network.fuse()
        torch.save({"model": network.half(), "version": version}, folder / "fused.pt")
        tell(folder / "fused.pt", network.float())
    (folder / "results.csv").unlink(missing_ok=True)


def first(*names: str) -> Any:
    """The first of some names that the installed version has: `module:attribute`."""
    for name in names:
        module, _, attribute = name.partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    raise ImportError(f"none of {names}")


def built() -> Any:
    """YOLOv8n with weights by a pattern; its outputs stay in bounds."""
    import torch

    network = first("ultralytics.nn.tasks:DetectionModel")("yolov8n.yaml", nc=len(NAMES), verbose=False)
    convolutions = {
        f"{name}.weight": module for name, module in network.named_modules() if hasattr(module, "kernel_size")
    }
    sizes: dict[str, int] = {}
    for number, (name, tensor) in enumerate(network.state_dict().items()):
        if "dfl" in name or not tensor.is_floating_point():
            continue
        pattern = ((torch.arange(tensor.numel()) * 7 + number) % 31 - 15) / 16
        if name in convolutions:
            sizes[name.replace("conv.weight", "bn.running_var")] = tensor[0].numel()
            pattern = pattern * (1 if ".conv." in name else 0.125)
        elif name.endswith("running_var"):
            pattern = (pattern / 4 + 1) * sizes[name] * 0.3125
        elif name.endswith("bn.weight"):
            pattern = pattern / 2 + 1
        tensor.copy_(pattern.view(tensor.shape))
    network.names = dict(enumerate(NAMES))
    network.yaml["yaml_file"] = "yolov8n.yaml"  # the first versions keep where it lies on the machine
    return network


def trainer_of(network: Any, folder: Path) -> Any:
    """The version's own trainer in the middle of a training."""
    import torch

    base = first("ultralytics.engine.trainer:BaseTrainer", "ultralytics.yolo.engine.trainer:BaseTrainer")
    average = first("ultralytics.utils.torch_utils:ModelEMA", "ultralytics.yolo.utils.torch_utils:ModelEMA")

    class Trainer(base):  # type: ignore[misc]
        def __init__(self) -> None:
            self.args = arguments()
            self.model, self.epoch, self.best_fitness, self.fitness = network, 3, 0.25, 0.25
            self.ema = average(network)
            self.optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.937)
            self.scaler = torch.amp.GradScaler("cpu", enabled=False)
            self.metrics = {"metrics/mAP50-95(B)": 0.25}
            self.wdir, self.last, self.best = folder, folder / "last.pt", folder / "best.pt"
            self.stopper = types.SimpleNamespace(best_fitness=0.25, best_epoch=2)
            self.save_period, self.csv = -1, folder / "results.csv"
            self.csv.write_text("epoch, metrics/mAP50-95(B)\n1,0.125\n2,0.25\n")
            self.args.save_dir = str(folder.name)

    trainer = Trainer()
    network.args = trainer.args
    if hasattr(network, "init_criterion"):  # the first batch makes it
        network.criterion = network.init_criterion()
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    trainer.optimizer.step()
    return trainer


def arguments() -> Any:
    """Settings of a training, as the version has them."""
    try:
        get = first("ultralytics.cfg:get_cfg", "ultralytics.yolo.cfg:get_cfg")
        return get(overrides={"imgsz": SIDE})
    except ImportError:
        config = first("ultralytics.yolo.configs:get_config")
        settings = config(first("ultralytics.yolo.utils:DEFAULT_CONFIG"), {"imgsz": SIDE})
        first("omegaconf:OmegaConf").set_struct(settings, False)
        return settings


def strip_optimizer(file: Path) -> None:
    """As at a training's end."""
    first("ultralytics.utils.torch_utils:strip_optimizer", "ultralytics.yolo.utils.torch_utils:strip_optimizer")(file)


def tell(file: Path, network: Any) -> None:
    """Write down what the network answers: scores, spread over the image, of the raw outputs."""
    import copy

    import torch

    plain = copy.deepcopy(network).float().eval()
    image = ((torch.arange(3 * SIDE * SIDE) * 5 % 17) / 16).view(1, 3, SIDE, SIDE)
    with torch.no_grad():
        answer = plain(image)[0][0, 4:].flatten()
    assert bool(answer.isfinite().all()) and float(answer.std()) > 1e-3, "the pattern is no network"
    places = [int(i) for i in torch.linspace(0, len(answer) - 1, PROBES)]
    file.with_suffix(".json").write_text(json.dumps({"scores": [round(float(answer[i]), 5) for i in places]}))


if __name__ == "__main__":
    main()
