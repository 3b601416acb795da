"""How long `data check` takes for many images, and how much memory; the first time and again.

    python benchmarks/data_check.py --images 100000

It writes as many JPEGs of 640 x 480 pixels, with labels in YOLO's layout (with `--coco` in COCO's), and runs the
command in a process of its own: twice, the second time with nothing changed. Decoding some of the files with OpenCV
alone, on as many threads, says how fast the machine is. The files show a thousand photo-like pictures, and each has
other bytes (a comment), so that none is a copy.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

WIDTH, HEIGHT = 640, 480
CLASSES = 20
BOXES = 7  # a picture, in the mean, as COCO has them
DECODED = 10_000
PICTURES = 1000  # that are drawn; a comment in the file makes others of them


def draw(root: Path, images: int, coco: bool) -> None:
    """Make a dataset of files that are all different."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (96, 128, 3), dtype=np.uint8)
    large = cv2.resize(coarse, (2 * WIDTH, 2 * HEIGHT), interpolation=cv2.INTER_CUBIC)
    large = np.clip(large + rng.normal(0, 6, large.shape), 0, 255).astype(np.uint8)
    described: dict[str, dict[str, Any]] = {}
    pictures = []
    for i in range(min(images, PICTURES)):
        x, y = rng.integers(0, WIDTH), rng.integers(0, HEIGHT)
        picture = np.ascontiguousarray(large[y : y + HEIGHT, x : x + WIDTH])
        cv2.putText(picture, str(i), (20, 240), cv2.FONT_HERSHEY_SIMPLEX, 2, (255, 255, 255), 3)
        pictures.append(cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 90])[1].tobytes())
    for i in range(images):
        split = "val" if i % 10 == 0 else "train"
        folder = root / "images" / split
        labels = root / "labels" / split
        if i < 2 or not folder.is_dir():
            folder.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
        picture, comment = pictures[i % len(pictures)], f"{i:08d}".encode()
        segment = b"\xff\xfe" + (len(comment) + 2).to_bytes(2, "big") + comment
        (folder / f"{i:06d}.jpg").write_bytes(picture[:2] + segment + picture[2:])
        sizes = rng.uniform(0.05, 0.4, (BOXES, 2))
        centres = sizes / 2 + rng.uniform(0, 1, (BOXES, 2)) * (1 - sizes)
        rows = [(int(rng.integers(CLASSES)), *centre, *size) for centre, size in zip(centres, sizes, strict=True)]
        if coco:
            _describe(described.setdefault(split, {"images": [], "annotations": []}), i, rows)
        else:
            text = "".join(f"{label} {x:.6f} {y:.6f} {w:.6f} {h:.6f}\n" for label, x, y, w, h in rows)
            (labels / f"{i:06d}.txt").write_text(text)
    names = [f"class {i}" for i in range(CLASSES)]
    if coco:
        (root / "annotations").mkdir()
        for split, content in described.items():
            content["categories"] = [{"id": i, "name": name} for i, name in enumerate(names)]
            (root / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    else:
        (root / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": names}))


def _describe(content: dict[str, Any], i: int, rows: list[tuple[Any, ...]]) -> None:
    content["images"].append({"id": i, "file_name": f"{i:06d}.jpg", "width": WIDTH, "height": HEIGHT})
    for label, x, y, width, height in rows:
        corner = [(x - width / 2) * WIDTH, (y - height / 2) * HEIGHT, width * WIDTH, height * HEIGHT]
        content["annotations"].append(
            {"id": len(content["annotations"]), "image_id": i, "category_id": label, "bbox": corner, "iscrowd": 0}
        )


def decode(root: Path, threads: int) -> tuple[int, float]:
    """How many files OpenCV alone decodes, `DECODED` at most, and in how many seconds."""
    files = sorted((root / "images").rglob("*.jpg"))[:DECODED]
    begin = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(files), 1000):
            list(pool.map(_decoded, files[start : start + 1000]))
    return len(files), time.perf_counter() - begin


def _decoded(file: Path) -> bool:
    return cv2.imdecode(np.fromfile(file, np.uint8), cv2.IMREAD_COLOR) is not None


def check(root: Path, cache: Path) -> dict[str, float]:
    """Run `data check`: seconds, the largest memory in MiB, and the load of the machine before."""
    load, environment = os.getloadavg()[0], {**os.environ, "XDG_CACHE_HOME": str(cache)}
    begin = time.perf_counter()
    command = [sys.executable, "-m", "yolov8_nas.commands.main", "data", "check", str(root)]
    _, status, used = os.wait4(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL).pid, 0)
    seconds = time.perf_counter() - begin
    if status:
        raise SystemExit(f"data check ended with status {status}")
    cpu = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "cpu_seconds": cpu, "mib": used.ru_maxrss / 1024, "load_before": load}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--coco", action="store_true", help="annotations in COCO's layout")
    parser.add_argument("--workdir", type=Path, help="folder for the images; one that goes away otherwise")
    parser.add_argument("--draw", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cv2.setNumThreads(1)
    if asked.draw:
        draw(asked.draw, asked.images, asked.coco)
        return
    threads = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=asked.workdir) as folder:
        root, cache = Path(folder) / "data", Path(folder) / "cache"
        # In a process of its own: a child's peak of memory is at least what its parent has.
        subprocess.run([sys.executable, *sys.argv, "--draw", str(root)], check=True)
        time.sleep(3)  # files that have just changed are not remembered
        layout = "COCO" if asked.coco else "YOLO"
        print(f"{asked.images:,} images of {WIDTH} x {HEIGHT}, {threads} cores, {layout} layout", flush=True)
        for name in ("first check", "second check"):
            figures = check(root, cache)
            print(
                f"{name}: {figures['seconds']:.1f} s ({figures['cpu_seconds']:.1f} s of computing), at most "
                f"{figures['mib']:.0f} MiB; load before {figures['load_before']:.1f}",
                flush=True,
            )
        count, seconds = decode(root, threads)
        print(f"decoding {count:,} of them alone, OpenCV on {threads} threads: {seconds:.1f} s")


if __name__ == "__main__":
    main()
