"""Datasets: reading, checks, splits, the normal form and the stage."""

import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from yolov8_nas.config import RunConfig
from yolov8_nas.data import dataset as normalised
from yolov8_nas.data.check import check_source, checked, source_digest
from yolov8_nas.data.sample import CLIPPED, EMPTY, ROUNDING
from yolov8_nas.data.splits import LEAST, SHARE, position, search_split
from yolov8_nas.data.yolo_layout import label_file
from yolov8_nas.data.yolo_rows import TOLERANCE, parse_row
from yolov8_nas.device.host import HostLock
from yolov8_nas.errors import InputError
from yolov8_nas.files import tree_digest
from yolov8_nas.runner.progress import Progress
from yolov8_nas.runner.stage import StageContext
from yolov8_nas.stages.data_prep import STAGE
from yolov8_nas.stages.data_prep.settings import DataSettings

NAMES = ["dent", "hole"]


def write_image(path: Path, seed: int, size: tuple[int, int] = (32, 24)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


def write_yolo(root: Path, train: int = 12, val: int = 4) -> Path:
    """A small sound dataset in YOLO's layout; every image has one box of each class."""
    for split, count, first in (("train", train, 0), ("val", val, 1000)):
        for i in range(count):
            write_image(root / f"images/{split}/{split}_{i:02d}.png", first + i)
            label = root / f"labels/{split}/{split}_{i:02d}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.25 0.5\n1 0.25 0.75 0.125 0.25\n")
    (root / "data.yaml").write_text(yaml.safe_dump({"train": "images/train", "val": "images/val", "names": NAMES}))
    return root


def write_coco(root: Path) -> Path:
    """The same dataset in COCO's layout."""
    yolo = write_yolo(root)
    for split in ("train", "val"):
        images = [
            {"id": i, "file_name": path.name, "width": 32, "height": 24}
            for i, path in enumerate(sorted((root / "images" / split).iterdir()))
        ]
        annotations = [
            {"id": 2 * image["id"] + k, "image_id": image["id"], "category_id": category, "bbox": bbox}
            for image in images
            for k, (category, bbox) in enumerate([(7, [12.0, 6.0, 8.0, 12.0]), (9, [6.0, 15.0, 4.0, 6.0])])
        ]
        categories = [{"id": 9, "name": "hole"}, {"id": 7, "name": "dent"}]
        (root / "annotations").mkdir(exist_ok=True)
        (root / f"annotations/instances_{split}.json").write_text(
            json.dumps({"images": images, "annotations": annotations, "categories": categories})
        )
    shutil.rmtree(yolo / "labels")
    (yolo / "data.yaml").unlink()
    return root


def edit_yaml(root: Path, **changes: Any) -> None:
    data = yaml.safe_load((root / "data.yaml").read_text()) | changes
    data = {key: value for key, value in data.items() if value is not ...}
    (root / "data.yaml").write_text(yaml.safe_dump(data))


def edit_coco(root: Path, split: str, change: Callable[[dict[str, Any]], object]) -> None:
    file = root / f"annotations/instances_{split}.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def prepare(source: Path | None, work: Path) -> Path:
    (work / "out").mkdir(parents=True)
    settings = DataSettings(source=None if source is None else str(source))
    STAGE.run(StageContext(settings, {}, work / "out", work / "partial", Progress.silent(), HostLock()))
    return work / "out"


# Layouts -------------------------------------------------------------------------------------------------------------


def test_sound_dataset(tmp_path: Path) -> None:
    found = check_source(write_yolo(tmp_path / "parts"))
    assert found.source == "parts"
    assert found.names == ("dent", "hole")
    assert found.images["train"] + found.images["search"] == 12 and found.images["val"] == 4
    assert found.images["search"] >= 1
    assert found.boxes["val"] == {"dent": 4, "hole": 4}
    assert found.warnings == ()


def as_list(root: Path) -> Path:
    edit_yaml(root, train=["images/train"], val=["images/val"])
    return root


def as_text_file(root: Path) -> Path:
    for split in ("train", "val"):
        names = sorted(path.name for path in (root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"./images/{split}/{name}\n" for name in names))
    edit_yaml(root, train="train.txt", val="val.txt")
    return root


def with_path(root: Path) -> Path:
    edit_yaml(root, path=str(root))
    (root.parent / "elsewhere").mkdir()
    return Path(shutil.move(root / "data.yaml", root.parent / "elsewhere/parts.yaml"))


def names_as_mapping(root: Path) -> Path:
    edit_yaml(root, names={1: "hole", 0: "dent"}, nc=2)
    return root


def validation_key(root: Path) -> Path:
    edit_yaml(root, val=..., validation="images/val")
    return root


def below_one_folder(root: Path) -> Path:
    (root.parent / "outer/inner").mkdir(parents=True)
    shutil.move(root, root.parent / "outer/inner/parts")
    return root.parent / "outer"


def as_tar(root: Path) -> Path:
    with tarfile.open(root.parent / "parts.tar.gz", "w:gz") as tar:
        tar.add(root, "top/parts")
    return root.parent / "parts.tar.gz"


def as_zip(root: Path) -> Path:
    with zipfile.ZipFile(root.parent / "parts.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, path.relative_to(root))
    return root.parent / "parts.zip"


def with_byte_order_mark(root: Path) -> Path:
    for path in [root / "data.yaml", *root.glob("labels/*/*.txt")]:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    return root


LAYOUTS = (
    as_list,
    as_text_file,
    with_path,
    names_as_mapping,
    validation_key,
    below_one_folder,
    as_tar,
    as_zip,
    with_byte_order_mark,
)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_read_alike(tmp_path: Path, layout: Callable[[Path], Path]) -> None:
    plain = check_source(write_yolo(tmp_path / "plain"))
    other = check_source(layout(write_yolo(tmp_path / "parts")))
    assert other.names == plain.names and other.boxes == plain.boxes and other.warnings == ()
    assert {s: [i.sha256 for i in images] for s, images in other.splits.items()} == {
        s: [i.sha256 for i in images] for s, images in plain.splits.items()
    }


def test_coco_gives_the_same_dataset_as_yolo(tmp_path: Path) -> None:
    yolo = normalised.load(prepare(write_yolo(tmp_path / "a/parts"), tmp_path / "yolo"))
    coco = normalised.load(prepare(write_coco(tmp_path / "b/parts"), tmp_path / "coco"))
    assert coco.classes == yolo.classes == ("dent", "hole")  # by category id, not by place in the file
    assert coco.digest == yolo.digest


def test_coco_leaves_out_crowds_and_empty_boxes_and_says_so(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")

    def change(content: dict[str, Any]) -> None:
        content["annotations"][0]["iscrowd"] = 1
        content["annotations"][1]["bbox"][2] = 0

    edit_coco(root, "val", change)
    found = check_source(root)
    assert found.boxes["val"] == {"dent": 3, "hole": 3}
    assert found.warnings == (
        "annotations/instances_val.json: 1 crowd regions left out",
        "annotations/instances_val.json: 1 boxes without a size left out",
    )


def test_images_without_labels_are_background(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "labels/train/train_00.txt").unlink()
    (root / "labels/train/train_01.txt").write_text("\n")
    found = check_source(root)
    assert sum(found.images.values()) == 16
    assert sum(found.boxes[split]["dent"] for split in ("train", "search")) == 10


@pytest.mark.parametrize(
    ("image", "labels"),
    [
        ("/d/images/train/a.png", "/d/labels/train/a.txt"),
        ("/d/train/images/a.b.png", "/d/train/labels/a.b.txt"),
        ("/images/d/images/images.png", "/images/d/labels/images.txt"),
        ("/d/pictures/a.png", "/d/pictures/a.txt"),
    ],
)
def test_label_file(image: str, labels: str) -> None:
    assert label_file(Path(image)) == Path(labels)


# Rows ----------------------------------------------------------------------------------------------------------------

sides = st.floats(1e-6, 1.0)


@given(label=st.integers(0, 79), width=sides, height=sides, x=st.floats(0, 1), y=st.floats(0, 1))
def test_rows_survive_writing_and_reading(label: int, width: float, height: float, x: float, y: float) -> None:
    row = f"{label} {width / 2 + x * (1 - width)!r} {height / 2 + y * (1 - height)!r} {width!r} {height!r}"
    box, outcome, what = parse_row(row, 80)
    assert box is not None and outcome is None and what is None
    again, *_ = parse_row(normalised.format_row(box), 80)
    assert again is not None and again.label == box.label == label
    assert again == box, "what was normalised once stays as it is"


@given(x=st.floats(-0.5, 1.5), width=st.floats(1e-3, 1.5))
def test_boxes_are_clipped_and_beyond_the_tolerance_it_is_said(x: float, width: float) -> None:
    low, high = x - width / 2, x + width / 2
    if low >= 1 + TOLERANCE or high <= -TOLERANCE:
        with pytest.raises(InputError, match="lies outside its image"):
            parse_row(f"0 {x!r} 0.5 {width!r} 0.5", 1)
        return
    box, outcome, _ = parse_row(f"0 {x!r} 0.5 {width!r} 0.5", 1)
    if min(high, 1) - max(low, 0) <= 1e-8:
        assert box is None or box.width <= 2e-8
        assert box is not None or outcome == EMPTY
        return
    assert box is not None
    if abs(low + TOLERANCE) > 1e-8 and abs(high - 1 - TOLERANCE) > 1e-8:
        assert outcome == (CLIPPED if low < -TOLERANCE or high > 1 + TOLERANCE else None)
    assert box.x - box.width / 2 >= -ROUNDING and box.x + box.width / 2 <= 1 + ROUNDING
    assert box.x - box.width / 2 == pytest.approx(max(low, 0), abs=1e-8)
    assert box.x + box.width / 2 == pytest.approx(min(high, 1), abs=1e-8)


@given(
    st.lists(st.one_of(st.floats().map(repr), st.integers(-2, 4).map(str), st.text("1.-e_ x", max_size=4))).map(
        " ".join
    )
)
def test_any_row_is_a_box_or_an_input_error(row: str) -> None:
    try:
        box, outcome, _ = parse_row(row, 3) if row.split() else (None, EMPTY, None)
    except InputError as error:
        assert "; " in str(error), "no remedy"
    else:
        if box is None:
            assert outcome == EMPTY
            return
        assert 0 <= box.label < 3 and box.width > 0 and box.height > 0


# Bad input -----------------------------------------------------------------------------------------------------------


def row(text: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        (root / "labels/train/train_03.txt").write_text("0 0.5 0.5 0.25 0.5\n" + text + "\n")

    return change


def truncate(root: Path) -> None:
    Image.open(root / "images/train/train_02.png").resize((200, 200)).save(root / "images/train/train_02.jpg")
    file = root / "images/train/train_02.jpg"
    file.write_bytes(file.read_bytes()[:-400])


def remove(*names: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        for name in names:
            shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()

    return change


def empty(name: str) -> Callable[[Path], object]:
    def change(root: Path) -> None:
        shutil.rmtree(root / name)
        (root / name).mkdir()

    return change


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(content)


BAD = {
    "no data.yaml": (remove("data.yaml"), ["data.yaml: missing", "write a data.yaml"]),
    "not yaml": (put("data.yaml", b"train: [a"), ["data.yaml: not YAML"]),
    "not text": (put("data.yaml", b"\xff\xfe\x00"), ["data.yaml: not YAML"]),
    "no mapping": (put("data.yaml", b"- a"), ["data.yaml: holds ['a']"]),
    "no val": (lambda root: edit_yaml(root, val=...), ["data.yaml: val is missing", "add a line"]),
    "no train": (lambda root: edit_yaml(root, train=...), ["data.yaml: train is missing", "add a line"]),
    "train is a number": (lambda root: edit_yaml(root, train=5), ["data.yaml: train: 5 does not exist"]),
    "train is a mapping": (lambda root: edit_yaml(root, train={"a": "b"}), ["data.yaml: train = {'a': 'b'}"]),
    "no such folder": (lambda root: edit_yaml(root, train="imgs"), ["data.yaml: train: imgs does not exist"]),
    "no images": (empty("images/train"), ["train: images/train: no images", "put images there (apng, avif, "]),
    "empty validation split": (empty("images/val"), ["val: images/val: the validation split is empty"]),
    "no names": (lambda root: edit_yaml(root, names=...), ["data.yaml: names = None"]),
    "names with a gap": (lambda root: edit_yaml(root, names={0: "a", 2: "b"}), ["names has the keys [0, 2]"]),
    "names twice": (
        lambda root: edit_yaml(root, names=["dent", "dent"]),
        ["class name 'dent' stands for [0, 1]", "give every class its own name"],
    ),
    "nc differs": (lambda root: edit_yaml(root, nc=3), ["nc = 3, but there are 2 names"]),
    "listed image missing": (
        lambda root: (edit_yaml(root, train="t.txt"), (root / "t.txt").write_text("\nimages/train/nope.png\n")),
        ["t.txt, line 2: 'images/train/nope.png' does not exist"],
    ),
    "class out of range": (
        row("2 0.5 0.5 0.1 0.1"),
        ["labels/train/train_03.txt, line 2: class 2 is out of range", "2 classes, 0 to 1", "names"],
    ),
    "negative class": (row("-1 0.5 0.5 0.1 0.1"), ["train_03.txt, line 2: class -1 is out of range"]),
    "class is a fraction": (row("0.5 0.5 0.5 0.1 0.1"), ["train_03.txt, line 2: class 0.5 is out of range"]),
    "box outside": (row("0 1.5 0.5 0.1 0.1"), ["line 2: box 0 1.5 0.5 0.1 0.1 lies outside its image", "take it out"]),
    "pixels": (row("0 16 12 8 8"), ["line 2: box 0 16 12 8 8 reaches out", "divide x and width"]),
    "nan": (row("0 nan 0.5 0.1 0.1"), ["line 2: '0 nan 0.5 0.1 0.1' holds a value that is not finite"]),
    "infinite": (row("0 0.5 0.5 inf 0.1"), ["line 2: ", "not finite"]),
    "no number": (row("0 0.5 x 0.1 0.1"), ["line 2: '0 0.5 x 0.1 0.1' holds something that is no number"]),
    "four columns": (row("0 0.5 0.5 0.1"), ["line 2: 4 columns", "class x y width height"]),
    "confidence": (row("0 0.5 0.5 0.1 0.1 0.9"), ["line 2: 6 columns", "leave out a confidence"]),
    "eight columns": (row("0 0.5 0.5 0.1 0.1 0.9 7 3"), ["line 2: 8 columns", "or a polygon"]),
    "negative size": (row("0 0.5 0.5 0.1 -0.1"), ["line 2: ", "has no size"]),
    "labels are no text": (put("labels/val/val_01.txt", b"\x93\xff\x00\x01"), ["labels/val/val_01.txt: not UTF-8"]),
    "unreadable image": (
        put("images/train/train_05.png", b"GIF89a nothing"),
        ["images/train/train_05.png: unreadable or truncated image", "replace it"],
    ),
    "empty image file": (put("images/val/val_00.png", b""), ["images/val/val_00.png: unreadable or truncated"]),
    "truncated image": (truncate, ["images/train/train_02.jpg: unreadable or truncated image"]),
    "tiny image": (
        lambda root: write_image(root / "images/train/train_00.png", 1, (5, 40)),
        ["images/train/train_00.png: 5 x 40 pixels", "at least 10"],
    ),
    "no boxes": (remove("labels/train"), ["train: no boxes in any image", "labels/train/train_00.txt"]),
    "no boxes in val": (remove("labels/val"), ["val: no boxes in any image", "label the validation images"]),
    "train is val": (
        lambda root: edit_yaml(root, train="images/val"),
        ["train has 0 distinct image(s) with boxes", "left out", "label more"],
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(tmp_path: Path, case: str) -> None:
    change, expected = BAD[case]
    root = write_yolo(tmp_path / "parts")
    change(root)
    before = tree_digest(root)
    with pytest.raises(InputError) as caught:
        check_source(root)
    message = str(caught.value)
    assert message.startswith(f"{root}: ")
    for text in expected:
        assert text in message
    assert " faults" not in message, "one cause, one fault"
    assert tree_digest(root) == before


BAD_COCO: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no images": (lambda c: c.pop("images"), "no list 'images'"),
    "path out of the folder": (
        lambda c: c["images"][0].update(file_name="../../x.png"),
        "image 0: file_name = '../../x.png'",
    ),
    "image missing": (lambda c: c["images"][0].update(file_name="x.png"), "'x.png' is not in images/train"),
    "image id twice": (lambda c: c["images"][1].update(id=0), "image 0: id = 0"),
    "image without size": (lambda c: c["images"][0].update(width=0), "image 0: width = 0"),
    "other size": (lambda c: c["images"][0].update(width=33), "its annotation says (33, 24)"),
    "image unknown": (lambda c: c["annotations"][3].update(image_id=77), "annotation 3: image_id = 77"),
    "category unknown": (lambda c: c["annotations"][3].update(category_id=[8]), "annotation 3: category_id = [8]"),
    "three numbers": (lambda c: c["annotations"][3].update(bbox=[1, 2, 3]), "annotation 3: bbox = [1, 2, 3]"),
    "nan": (lambda c: c["annotations"][3].update(bbox=[1, 2, 3, float("nan")]), "annotation 3: bbox = [1, 2, 3, nan]"),
    "outside": (lambda c: c["annotations"][3].update(bbox=[40, 2, 8, 3]), "box [40, 2, 8, 3] lies outside its image"),
    "other categories": (lambda c: c["categories"][0].update(name="gap"), "categories differ from train's"),
    "category ids twice": (lambda c: c["categories"][0].update(id=7), "categories without an id of their own"),
}


@pytest.mark.parametrize("case", BAD_COCO)
def test_bad_coco_is_named(tmp_path: Path, case: str) -> None:
    change, expected = BAD_COCO[case]
    root = write_coco(tmp_path / "parts")
    edit_coco(root, "train", change)
    with pytest.raises(InputError) as caught:
        check_source(root)
    assert expected in str(caught.value)


def test_coco_without_validation(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    (root / "annotations/instances_val.json").unlink()
    with pytest.raises(InputError, match=r"annotations: none for val; keep one file instances_val\.json"):
        check_source(root)


def test_many_faults_are_counted_and_the_first_ten_named(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for file in root.glob("labels/train/*.txt"):
        file.write_text("5 0.5 0.5 0.1 0.1\n")
    (root / "images/val/val_00.png").write_bytes(b"")
    with pytest.raises(InputError) as caught:
        check_source(root)
    lines = str(caught.value).splitlines()
    assert lines[0] == f"{root}: 13 faults"
    assert len(lines) == 12 and lines[-1].strip() == "... and 3 more"


def test_source_that_is_not_there_or_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file or folder; give"):
        check_source(tmp_path / "nothing")
    with pytest.raises(InputError, match=r"ftp://vision/line3\.tar: addresses of this kind are not read; give"):
        check_source("ftp://vision/line3.tar")
    (tmp_path / "notes.tar").write_text("not a tar")
    with pytest.raises(InputError, match=r"notes\.tar"):
        check_source(tmp_path / "notes.tar")


def test_archives_cannot_read_outside_themselves(tmp_path: Path) -> None:
    write_yolo(tmp_path / "secret")
    root = write_yolo(tmp_path / "parts")
    edit_yaml(root, train=str(tmp_path / "secret/images/train"))
    check_source(root)  # a folder of one's own may point anywhere
    with pytest.raises(InputError, match="lies outside the dataset"):
        check_source(as_tar(root))


# The same image twice ------------------------------------------------------------------------------------------------


def test_an_image_in_train_and_val_is_named_and_stays_in_val_only(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    shutil.copy(root / "images/val/val_02.png", root / "images/train/copy.png")
    (root / "labels/train/copy.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    found = check_source(root)
    assert found.images["val"] == 4 and found.images["train"] + found.images["search"] == 12
    (warning,) = found.warnings
    assert "images/train/copy.png = images/val/val_02.png" in warning and "left out of train" in warning
    shas = {split: {image.sha256 for image in images} for split, images in found.splits.items()}
    assert not shas["train"] & shas["val"] and not shas["search"] & shas["val"] and not shas["train"] & shas["search"]


def test_an_image_twice_in_one_split_counts_once(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    shutil.copy(root / "images/val/val_02.png", root / "images/val/x.png")
    found = check_source(root)
    assert found.images["val"] == 4
    assert "images/val/x.png = images/val/val_02.png (with other labels)" in found.warnings[0]


# Splits --------------------------------------------------------------------------------------------------------------

hashes = st.binary(min_size=32, max_size=32).map(bytes.hex)


def shas(count: int, seed: int = 0) -> list[str]:
    source = random.Random(seed)
    return [source.randbytes(32).hex() for _ in range(count)]


@given(st.dictionaries(hashes, st.booleans(), max_size=60))
def test_both_sides_have_boxes_or_it_is_an_error(images: dict[str, bool]) -> None:
    labelled = {sha256 for sha256, boxes in images.items() if boxes}
    if len(labelled) < 2:
        with pytest.raises(InputError, match="label more"):
            search_split(images)
        return
    chosen = search_split(images)
    assert labelled & chosen and labelled - chosen
    assert chosen <= set(images)


@given(st.integers(100, 400), st.integers(0, 400), st.integers(0, 2**32))
def test_no_image_changes_sides_when_the_dataset_grows(before: int, more: int, seed: int) -> None:
    images = shas(before + more, seed)
    small, large = (search_split(dict.fromkeys(part, True)) for part in (images[:before], images))
    if sum(position(sha256) < SHARE for sha256 in images[:before]) >= LEAST:
        assert small == large & set(images[:before])
    assert abs(len(large) / len(images) - SHARE) < 0.2


def test_the_share_is_what_it_says() -> None:
    images = shas(5000)
    assert abs(len(search_split(dict.fromkeys(images, True))) / 5000 - SHARE) < 0.02
    assert all(0 <= position(sha256) < 1 for sha256 in (*images, "0" * 64, "f" * 64))


# The normal form -----------------------------------------------------------------------------------------------------


def test_stage_writes_the_same_bytes_from_folder_and_archive(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    outs = [prepare(source, tmp_path / str(i)) for i, source in enumerate((root, root, as_tar(root)))]
    assert len({tree_digest(out) for out in outs}) == 1
    written = normalised.load(outs[0])
    for split, count in written.images.items():
        images = sorted((outs[0] / "dataset/images" / split).iterdir())
        labels = sorted((outs[0] / "dataset/labels" / split).iterdir())
        assert [path.stem for path in images] == [path.stem for path in labels] and len(images) == count
    assert not any((tmp_path / "2/partial").iterdir()), "what was unpacked goes away"


def test_digest_is_of_content(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    digests, sources = [], []
    for i, change in enumerate(
        (
            lambda: (root / "notes.md").write_text("not part of it"),
            lambda: edit_yaml(root, names=["dent", "gap"]),
            lambda: (root / "labels/val/val_00.txt").write_text("0 0.5 0.5 0.25 0.25\n"),
            lambda: write_image(root / "images/val/val_00.png", 77),
        )
    ):
        if i == 0:
            sources.append(source_digest(root))
            digests.append(normalised.load(prepare(root, tmp_path / "first")).digest)
        change()
        sources.append(source_digest(root))
        digests.append(normalised.load(prepare(root, tmp_path / str(i))).digest)
    for values in (digests, sources):
        assert values[0] == values[1] and len(set(values)) == 4


def test_names_cannot_leave_the_dataset_or_collide(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for i, name in enumerate(("a/same.png", "b/same.png", "b/same.jpg", "Ünicode & blank.png", ".. .png", "-rf.png")):
        write_image(root / "images/train" / name, 500 + i)
    out = prepare(root, tmp_path / "work")
    names = [path.name for split in ("train", "search") for path in (out / "dataset/images" / split).iterdir()]
    assert len(names) == len(set(names)) == 12 + 6 - 1  # `.. .png` begins with a dot: hidden, as by shells
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isascii() for name in names)
    assert sum(name.startswith("same-") for name in names) == 3


def test_a_jpeg_without_its_end_is_closed(tmp_path: Path) -> None:
    """Ultralytics would rewrite it in place, and the stage's output with it."""
    root = write_yolo(tmp_path / "parts")
    file = root / "images/train/open.jpg"
    write_image(file, 3)
    file.write_bytes(file.read_bytes() + b"trailing")
    out = prepare(root, tmp_path / "work")
    (copied,) = (path for path in out.rglob("open-*.jpg"))
    assert copied.read_bytes() == file.read_bytes() + b"\xff\xd9"
    assert Image.open(copied).size == (32, 24)


def test_settings_follow_content(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    config = RunConfig.parse({"data": str(root), "targets": [{"constraints": ["latency<=5ms"]}]}, "test")
    settings = STAGE.settings(config, None)
    assert settings == STAGE.settings(config.model_copy(update={"seed": 5}), None)
    write_image(root / "images/val/new.png", 99)
    assert settings != STAGE.settings(config, None)
    assert STAGE.settings(config.model_copy(update={"data": None}), None) == DataSettings(source=None)


def test_data_yaml_shows_the_splits_asked_for(tmp_path: Path) -> None:
    out = prepare(write_yolo(tmp_path / "parts"), tmp_path / "work")
    for validate_on, train_on in (("search", ("train",)), ("val", ("train",)), ("val", ("train", "search"))):
        path = normalised.data_yaml(out, tmp_path / "views", validate_on, train_on)
        data = yaml.safe_load(path.read_text())
        shown = {split: sorted(p.resolve() for p in Path(data[split]).iterdir()) for split in ("train", "val")}
        images = out.resolve() / "dataset/images"
        assert shown["val"] == sorted((images / validate_on).iterdir())
        assert shown["train"] == sorted(p for split in train_on for p in (images / split).iterdir())
        assert data["names"] == {0: "dent", 1: "hole"}
        before = path.stat().st_mtime_ns
        assert normalised.data_yaml(out, tmp_path / "views", validate_on, train_on) == path
        assert path.stat().st_mtime_ns == before, "a view in use is not made again"


def test_ultralytics_reads_every_label_and_leaves_the_dataset_alone(tmp_path: Path) -> None:
    from ultralytics.cfg import get_cfg
    from ultralytics.data.build import build_yolo_dataset
    from ultralytics.data.utils import check_det_dataset

    out = prepare(write_yolo(tmp_path / "parts"), tmp_path / "work")
    before = tree_digest(out)
    data = check_det_dataset(normalised.data_yaml(out, tmp_path / "view", "search"))
    for split, ours in (("train", "train"), ("val", "search")):
        read = build_yolo_dataset(get_cfg(overrides={"imgsz": 32}), data[split], 4, data, mode="val")
        assert len(read) == normalised.load(out).images[ours]
        assert all(label["cls"].ravel().tolist() == [0, 1] for label in read.labels)
    assert list((tmp_path / "view").rglob("*.cache")), "the caches land in the view"
    assert tree_digest(out) == before


def test_the_context_ends_with_the_archive(tmp_path: Path) -> None:
    archive = as_zip(write_yolo(tmp_path / "parts"))
    with checked(archive, scratch=tmp_path) as found:
        assert all(image.file.is_file() for images in found.splits.values() for image in images)
    assert not any(image.file.exists() for images in found.splits.values() for image in images)


def test_the_demo_is_named_without_being_made() -> None:
    assert check_source(None).names == ("scratch", "dent", "hole", "stain")
