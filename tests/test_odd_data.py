"""Datasets as people really have them: what must just work, what must be said, and what must be refused."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image
from test_data import as_zip, edit_coco, edit_yaml, prepare, write_coco, write_image, write_yolo

from yolov8_nas.data import dataset as normalised
from yolov8_nas.data import images, known, ledger, yolo_layout
from yolov8_nas.data.check import CheckedDataset, check_source, source_digest
from yolov8_nas.data.images import look, normal, ranges
from yolov8_nas.data.yolo_rows import ORIENTED, POLYGON, POSE, parse_row
from yolov8_nas.errors import InputError

Change = Callable[[Path], object]

HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAX1tZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAA"
    "ACJpbG9jAAAAAERAAAEAAQAAAAABoQABAAAAAAAAAFUAAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRt"
    "AAAAAAABAAAA/WlwcnAAAADdaXBjbwAAAHZodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMA"
    "AAMAHroCQGEAAQAqQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbq5Ka5uAhoMCAAAAMDIAAAAwAhYgABAAZEAcFzwIkAAAATY29scm5j"
    "bHgAAQANAAaAAAAAFGlzcGUAAAAAAAAAQAAAAEAAAAAoY2xhcAAAAEAAAAABAAAAMAAAAAEAAAAAAAAAAv////AAAAACAAAAEHBp"
    "eGkAAAAAAwgICAAAABhpcG1hAAAAAAAAAAEAAQWBAgMFhAAAAF1tZGF0AAAAUSgBr1j5ExV/+ll/6NSE97LxzDULVcbj9aBa2plQ"
    "T/x38VgN7IdCNpN79d/JGAzUZCzVIF6hK0EWJ/XwzJADraBy+D1N9vvx9cn2bGR7kFMOoA=="
)
"""64 x 48 pixels, the left half red and the right one blue, both darker above."""


def tally(found: CheckedDataset, split: str, kind: str) -> dict[str, int]:
    """What the ledger says became of a split's files, labels or boxes."""
    return {outcome: entry.count for outcome, entry in found.ledger.get(split, {}).get(kind, {}).items()}


def used(found: CheckedDataset) -> tuple[int, int]:
    """Images of train (before the search split is cut from it) and of val."""
    return found.images["train"] + found.images["search"], found.images["val"]


def boxes(found: CheckedDataset) -> int:
    return sum(sum(counts.values()) for counts in found.boxes.values())


# A. The ledger -------------------------------------------------------------------------------------------------------


def encoded(form: str, size: tuple[int, int] = (32, 24), seed: int = 1, **options: Any) -> bytes:
    pixels = cv2.resize(np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8), size)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, form, **options)
    return stream.getvalue()


def renamed(root: Path, old: str, new: str) -> None:
    (root / new).parent.mkdir(parents=True, exist_ok=True)
    shutil.move(root / old, root / new)


KINDS = {
    "avif": encoded("AVIF"),
    "jfif": encoded("JPEG"),
    "jpe": encoded("JPEG", seed=2),
    "gif": encoded("GIF"),
    "jp2": encoded("JPEG2000"),
    "j2k": encoded("JPEG2000", seed=2, no_jp2=True),
    "ppm": encoded("PPM"),
    "tga": encoded("TGA"),
    "heic": HEIC,
    "HEIF": HEIC + b"\0",
    "mpo": encoded("MPO", save_all=True, append_images=[Image.new("RGB", (32, 24))]),
    "TIF": encoded("TIFF"),
}


def test_images_of_every_kind_are_used_and_become_what_training_reads(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for kind, data in KINDS.items():
        (root / f"images/train/kind_{kind}.{kind}").write_bytes(data)
        (root / f"labels/train/kind_{kind}.txt").write_text("0 0.5 0.5 0.25 0.5\n")
    found = check_source(root)
    assert used(found) == (12 + len(KINDS), 4)
    assert tally(found, "train", "files") == {"used, with boxes": 12 + len(KINDS)}
    out = prepare(root, tmp_path / "work")
    written = [path for split in ("train", "search") for path in (out / "dataset/images" / split).iterdir()]
    assert {path.suffix for path in written} == {".png", ".jpg"}
    for path in written:
        assert cv2.imread(os.fspath(path), cv2.IMREAD_COLOR) is not None
    assert normalised.load(out).ledger == found.ledger
    assert normalised.load(out).converted["AVIF converted to PNG"] == 1


LEDGER: dict[str, tuple[Change, str, str, dict[str, int], str]] = {
    "an image of a kind that is not read": (
        lambda root: (root / "images/train/a.psd").write_bytes(b"8BPS"),
        "train",
        "files",
        {"skipped: other pictures (.psd)": 1},
        "train: 1 of 13 files skipped: other pictures (.psd): images/train/a.psd; save them, or frames of them, as",
    ),
    "a video": (
        lambda root: (root / "images/train/a.MP4").write_bytes(b"x"),
        "train",
        "files",
        {"skipped: videos (.mp4)": 1},
        "a.MP4",
    ),
    "a file that is no image": (
        lambda root: (root / "images/train/Thumbs.db").write_bytes(b"x"),
        "train",
        "files",
        {"skipped: no images (.db)": 1},
        "",
    ),
    "an image by content, not by name": (
        lambda root: shutil.copy(write_image(root / "x.png", 77), root / "images/train/part"),
        "train",
        "files",
        {"skipped: images by content, but not by name": 1},
        "images/train/part",
    ),
    "a link that leads nowhere": (
        lambda root: (root / "images/train/gone.jpg").symlink_to("/nowhere/a.jpg"),
        "train",
        "files",
        {"skipped: a link that leads nowhere": 1},
        "images/train/gone.jpg",
    ),
    "a link to a folder above": (
        lambda root: (root / "images/train/loop").symlink_to(root / "images"),
        "train",
        "files",
        {"skipped: a link to a folder above it": 1},
        "images/train/loop",
    ),
    "a pipe": (
        lambda root: os.mkfifo(root / "images/train/pipe.jpg"),
        "train",
        "files",
        {"skipped: no file": 1},
        "images/train/pipe.jpg",
    ),
    "hidden folders": (
        lambda root: [
            write_image(root / f"images/train/{name}/train_00.png", 0)
            for name in (".ipynb_checkpoints", "@eaDir", "__MACOSX")
        ],
        "train",
        "files",
        {"skipped: hidden files and folders": 3},
        "",
    ),
    "a label without an image": (
        lambda root: (root / "labels/train/stray.txt").write_text("0 0.5 0.5 0.1 0.1\n"),
        "train",
        "labels",
        {"skipped: without an image": 1},
        "labels/train/stray.txt",
    ),
    "a label beside an image that has one elsewhere": (
        lambda root: (root / "images/train/train_00.txt").write_text("1 0.5 0.5 0.1 0.1\n"),
        "train",
        "labels",
        {"read, with rows": 12, "skipped: beside an image whose labels are elsewhere": 1},
        "",
    ),
    "a list of classes": (
        lambda root: (root / "labels/val/classes.txt").write_text("dent\nhole\n"),
        "val",
        "labels",
        {"skipped: lists and notes": 1},
        "",
    ),
    "a row that stands there twice": (
        lambda root: (root / "labels/val/val_00.txt").write_text("0 0.5 0.5 0.25 0.5\n" * 2),
        "val",
        "boxes",
        {"left out: there twice": 1},
        "",
    ),
    "a box without a size": (
        lambda root: (root / "labels/val/val_00.txt").write_text("0 0.5 0.5 0.25 0.5\n1 0.5 0.5 0 0.1\n"),
        "val",
        "boxes",
        {"left out: without a size": 1},
        "",
    ),
    "a box that sticks out": (
        lambda root: (root / "labels/val/val_00.txt").write_text("0 0.99 0.5 0.1 0.1\n"),
        "val",
        "boxes",
        {"clipped to their image": 1},
        "",
    ),
}


@pytest.mark.parametrize("case", LEDGER)
def test_the_ledger_accounts_for(tmp_path: Path, case: str) -> None:
    change, split, kind, expected, warned = LEDGER[case]
    root = write_yolo(tmp_path / "parts")
    change(root)
    found = check_source(root)
    counted = tally(found, split, kind)
    assert {outcome: count for outcome, count in counted.items() if outcome in expected} == expected
    assert used(found) == (12, 4)
    assert bool(warned) == bool(found.warnings)
    assert not warned or warned in " ".join(found.warnings)


def test_the_ledger_adds_up_or_it_is_our_fault() -> None:
    book = ledger.Ledger()
    book.see("train", 2)
    book.add("train", "files", ledger.WITH_BOXES)
    with pytest.raises(AssertionError, match="2 files seen, but 1 accounted for"):
        book.balance()


def test_linked_folders_are_entered(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for kind in ("images", "labels"):
        renamed(root, f"{kind}/train", f"../elsewhere/{kind}/train")
        (root / kind / "train").mkdir()
        (root / kind / "train/batch").symlink_to(tmp_path / "elsewhere" / kind / "train")
    found = check_source(root)
    assert used(found) == (12, 4) and boxes(found) == 32


def test_a_fifth_without_labels_is_named(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for i in range(3):
        (root / f"labels/train/train_{i:02d}.txt").unlink()
    (warning,) = check_source(root).warnings
    assert warning.startswith(
        "3 of 12 images of train have no label file and count as background: images/train/train_00"
    )
    assert "labels/train/train_00.txt" in warning
    (root / "labels/train/train_02.txt").write_text("")
    found = check_source(root)
    assert found.warnings == ()
    assert tally(found, "train", "files") == {
        "used, with boxes": 9,
        "used as background: labelled, without boxes": 1,
        "used as background: without a label file": 2,
    }


def beside(root: Path) -> None:
    for path in list(root.glob("labels/*/*.txt")):
        renamed(root, os.fspath(path.relative_to(root)), f"images/{path.parent.name}/{path.name}")


def in_capitals(root: Path) -> None:
    for path in list(root.glob("labels/*/*.txt")):
        path.rename(path.with_name(path.stem.upper() + ".TXT"))


def with_both_endings(root: Path) -> None:
    for path in list(root.glob("labels/*/*.txt")):
        path.rename(path.with_name(path.stem + ".png.txt"))


def split_first(root: Path) -> None:
    for split in ("train", "val"):
        renamed(root, f"images/{split}", f"{split}/images")
        renamed(root, f"labels/{split}", f"{split}/labels")
    edit_yaml(root, train="../train/images", val="../val/images")


def in_a_folder_of_labels(root: Path) -> None:
    for split in ("train", "val"):
        renamed(root, f"images/{split}", f"{split}")
    edit_yaml(root, train="train", val="val")


def images_in_capitals(root: Path) -> None:
    renamed(root, "images", "Images")
    edit_yaml(root, train="Images/train", val="Images/val")


def flat_labels(root: Path) -> None:
    for path in list(root.glob("labels/*/*.txt")):
        renamed(root, os.fspath(path.relative_to(root)), f"labels/{path.name}")


def absolute_elsewhere(root: Path) -> None:
    edit_yaml(root, path="/content/drive/parts", train="/content/drive/parts/images/train", val=r"C:\data\images\val")


def lists_of_another_machine(root: Path) -> None:
    for split in ("train", "val"):
        names = sorted(path.name for path in (root / "images" / split).iterdir())
        (root / f"{split}.txt").write_text("".join(f"data/images/{split}/{name}\n" for name in names))
    edit_yaml(root, train="train.txt", val="val.txt")


def windows_lists(root: Path) -> None:
    for split in ("train", "val"):
        names = sorted(path.name for path in (root / "images" / split).iterdir())
        text = "".join(f"D:\\parts\\images\\{split}\\{name}\r\n" for name in names)
        (root / f"{split}.txt").write_bytes(text.encode("utf-16"))
    edit_yaml(root, train="train.txt", val="val.txt")


def utf16(root: Path) -> None:
    for path in [root / "data.yaml", *root.glob("labels/*/*.txt")]:
        path.write_bytes(path.read_text().encode("utf-16"))


def with_tabs_and_old_line_ends(root: Path) -> None:
    for path in root.glob("labels/*/*.txt"):
        path.write_bytes(path.read_bytes().replace(b" ", b"\t").replace(b"\n", b"\r"))


def whole_floats(root: Path) -> None:
    for path in root.glob("labels/*/*.txt"):
        path.write_text(path.read_text().replace("\n1 ", "\n1.0 "))


def beside_another_folder(root: Path) -> None:
    renamed(root, "images", "parts/images")
    renamed(root, "labels", "parts/labels")
    renamed(root, "data.yaml", "parts/data.yaml")
    write_image(root / "docs/example.png", 5)
    (root / "README.md").write_text("read me")
    (root / "__MACOSX/parts").mkdir(parents=True)
    (root / "__MACOSX/parts/._data.yaml").write_bytes(b"\0")


def darknet(root: Path) -> None:
    """As CVAT exports "YOLO 1.1"."""
    for split, folder in (("train", "obj_train_data"), ("val", "obj_valid_data")):
        for kind in ("images", "labels"):
            for path in list((root / kind / split).iterdir()):
                renamed(root, os.fspath(path.relative_to(root)), f"{folder}/{path.name}")
        names = sorted(path.name for path in (root / folder).glob("*.png"))
        (root / f"{split}.txt").write_text("".join(f"data/{folder}/{name}\n" for name in names))
    (root / "obj.names").write_text("dent\nhole\n")
    (root / "obj.data").write_text(
        "classes = 2\ntrain = data/train.txt\nvalid = data/val.txt\nnames = data/obj.names\nbackup = backup/\n"
    )
    (root / "data.yaml").unlink()


def other_yaml_beside(root: Path) -> None:
    (root / "data.yaml").rename(root / "parts.yaml")
    (root / "compose.yaml").write_text("services: {a: {image: b}}\n")


ODD_YOLO: dict[str, tuple[Change, bool]] = {
    "labels beside the images": (beside, False),
    "labels in capitals": (in_capitals, False),
    "labels named after the whole image": (with_both_endings, False),
    "a folder for each split": (split_first, False),
    "images in train, labels in labels/train": (in_a_folder_of_labels, False),
    "Images with a capital": (images_in_capitals, False),
    "labels without folders of splits": (flat_labels, False),
    "paths of another machine": (absolute_elsewhere, True),
    "lists of another machine": (lists_of_another_machine, False),
    "lists of Windows": (windows_lists, False),
    "UTF-16": (utf16, False),
    "tabs and old line ends": (with_tabs_and_old_line_ends, False),
    "whole floats as classes": (whole_floats, False),
    "a folder beside the dataset": (beside_another_folder, False),
    "a description in a folder of its own": (lambda root: renamed(root, "data.yaml", "cfg/data.yaml"), False),
    "another YAML file": (other_yaml_beside, False),
    "Darknet, as CVAT exports it": (darknet, False),
    "keys in capitals": (
        lambda root: edit_yaml(root, train=..., val=..., Train="images/train", Val="images/val"),
        False,
    ),
    "a list of classes, as Label Studio exports it": (
        lambda root: [(root / "data.yaml").unlink(), (root / "classes.txt").write_text("dent\nhole\n")],
        False,
    ),
    "validation is called valid": (lambda root: edit_yaml(root, val=..., valid="images/val"), False),
}


@pytest.mark.parametrize("case", ODD_YOLO)
def test_odd_yolo_layouts_read_as_the_plain_one(tmp_path: Path, case: str) -> None:
    change, warned = ODD_YOLO[case]
    plain = check_source(write_yolo(tmp_path / "plain"))
    root = write_yolo(tmp_path / "parts")
    change(root)
    found = check_source(root)
    assert found.names == plain.names and found.boxes == plain.boxes
    assert {s: [i.sha256 for i in several] for s, several in found.splits.items()} == {
        s: [i.sha256 for i in several] for s, several in plain.splits.items()
    }
    assert bool(found.warnings) == warned, found.warnings


def test_a_folder_beside_the_dataset_in_an_archive(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    beside_another_folder(root)
    assert used(check_source(as_zip(root))) == (12, 4)


def test_images_and_labels_without_splits_give_their_own_validation_images(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for kind in ("images", "labels"):
        for path in list((root / kind).glob("*/*")):
            path.rename(root / kind / path.name)
        for folder in ("train", "val"):
            (root / kind / folder).rmdir()
    (root / "data.yaml").unlink()
    (root / "classes.txt").write_text("dent\nhole\n")
    found = check_source(root)
    assert sum(used(found)) == 16 and boxes(found) == 32 and used(found)[1] >= 1
    assert "classes.txt: no validation images; a fifth" in found.warnings[0]


def test_darknet_without_validation_images(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    darknet(root)
    (root / "obj.data").write_text("classes = 2\ntrain = data/train.txt\nnames = data/obj.names\n")
    found = check_source(root)
    assert sum(used(found)) == 12 and used(found)[1] >= 1
    assert "obj.data: no validation images; a fifth" in found.warnings[0]


def test_two_images_of_one_label_file_are_named(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    write_image(root / "images/train/train_03.bmp", 99)
    (warning,) = check_source(root).warnings
    assert (
        "1 image(s) share their labels with another: images/train/train_03.png and images/train/train_03.bmp" in warning
    )


def test_two_datasets_are_not_chosen_between(tmp_path: Path) -> None:
    write_yolo(tmp_path / "both/a")
    write_yolo(tmp_path / "both/b")
    with pytest.raises(InputError, match=r"a/data\.yaml, b/data\.yaml: more than one dataset; give the path"):
        check_source(tmp_path / "both")


def test_where_no_layout_fits_it_says_what_was_seen(tmp_path: Path) -> None:
    for i in range(3):
        write_image(tmp_path / f"voc/JPEGImages/{i}.jpg", i)
        (tmp_path / "voc/Annotations").mkdir(exist_ok=True)
        (tmp_path / f"voc/Annotations/{i}.xml").write_text("<annotation/>")
    with pytest.raises(InputError) as caught:
        check_source(tmp_path / "voc")
    assert "3 XML files, as Pascal VOC has them such as Annotations/0.xml, 3 images such as JPEGImages/0.jpg" in str(
        caught.value
    )
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="seen: nothing"):
        check_source(tmp_path / "empty")


def test_labels_of_another_layout_are_told(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for path in list(root.glob("labels/*/*.txt")):
        path.rename(path.with_suffix(".xml"))
    with pytest.raises(InputError, match=r"no boxes in any image \(seen: 16 .*, 16 XML files, as Pascal VOC has them"):
        check_source(root)


def test_labelled_images_that_cannot_be_had_are_faults(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "images/train/train_01.png").unlink()
    (root / "images/train/train_01.png").symlink_to("../gone.png")
    (root / "images/train/train_02.png").rename(root / "images/train/train_02.psd")
    (root / "images/train/train_03.png").write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0")
    with pytest.raises(InputError) as caught:
        check_source(root)
    for text in (
        "train_01.png: a link that leads nowhere, but it has labels",
        "train_02.psd: has labels, but other pictures (.psd) are not read",
        "train_03.png: unreadable or truncated image (a pointer of Git LFS); fetch the file with `git lfs pull`",
    ):
        assert text in str(caught.value)


# Copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a copy.png", "zz.png", "sub/train_05.png"])
def test_of_copies_the_labelled_one_stays(tmp_path: Path, name: str) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "images/train/sub").mkdir()
    shutil.copy(root / "images/train/train_05.png", root / "images/train" / name)
    found = check_source(root)
    assert used(found) == (12, 4) and boxes(found) == 32
    assert tally(found, "train", "files") == {"used, with boxes": 12, "skipped: copies of another image": 1}
    assert f"images/train/{name} = images/train/train_05.png (with other labels)" in found.warnings[0]


def test_equal_images_with_other_labels_are_named_first(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for i in range(12):
        shutil.copy(root / f"images/train/train_{i:02d}.png", root / f"images/train/x{i}.png")
        shutil.copy(root / f"labels/train/train_{i:02d}.txt", root / f"labels/train/x{i}.txt")
    (root / "labels/train/x9.txt").write_text("1 0.5 0.5 0.25 0.5\n")
    (warning,) = check_source(root).warnings
    assert "once: images/train/x9.png = images/train/train_09.png (with other labels), " in warning


def test_rows_in_another_order_are_no_conflict(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    shutil.copy(root / "images/train/train_05.png", root / "images/train/x.png")
    rows = (root / "labels/train/train_05.txt").read_text().splitlines()
    (root / "labels/train/x.txt").write_text("\n".join(reversed(rows)))
    assert "other labels" not in check_source(root).warnings[0]


def test_an_image_of_val_without_labels_that_train_has_labelled_stays_in_train(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    shutil.copy(root / "images/train/train_05.png", root / "images/val/again.png")
    found = check_source(root)
    assert used(found) == (12, 4) and boxes(found) == 32
    assert "val without boxes are in train too and are left out of val: images/val/again.png" in found.warnings[0]


# Images as the training opens them -----------------------------------------------------------------------------------

DEEP = np.random.default_rng(0).integers(0, 4096, (24, 32)).astype(np.uint16)  # twelve bits in sixteen


def tiff(values: np.ndarray, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(values).save(stream, "TIFF", **options)
    return stream.getvalue()


def by_opencv(suffix: str, values: np.ndarray) -> bytes:
    return bytes(cv2.imencode(suffix, values)[1].tobytes())


DEPTHS: dict[str, tuple[bytes, str]] = {
    "PNG of 16 bits": (by_opencv(".png", DEEP), "uint16"),
    "PNG of 16 bits a colour": (by_opencv(".png", np.dstack([DEEP] * 3)), "uint16"),
    "TIFF of 16 bits": (tiff(DEEP), "uint16"),
    "TIFF of 16 bits a colour": (by_opencv(".tif", np.dstack([DEEP] * 3)), "uint16"),
    "TIFF of 16 bits, LZMA": (tiff(DEEP, compression="lzma"), "uint16"),
    "TIFF of 16 bits, Zstandard": (tiff(DEEP, compression="zstd"), "uint16"),
    "TIFF of 16 bits with a sign": (tiff((DEEP.astype(np.int32) - 2000).astype(np.uint16), tiffinfo={339: 2}), "int16"),
    "TIFF of 32 bits": (tiff(DEEP.astype(np.int32)), "int32"),
    "TIFF of floats": (tiff(DEEP.astype(np.float32) / 4096), "float32"),
    "TIFF of floats a colour": (by_opencv(".tif", np.dstack([DEEP] * 3).astype(np.float32)), "float32"),
    "PGM of 16 bits": (by_opencv(".pgm", DEEP), "uint16"),
}


@pytest.mark.parametrize("case", DEPTHS)
def test_more_than_eight_bits_are_converted_by_the_range_in_use(case: str) -> None:
    data, depth = DEPTHS[case]
    facts = look(data)
    assert (facts.depth, facts.kept, facts.suffix, facts.width, facts.height) == (depth, False, ".png", 32, 24)
    read = cv2.imdecode(np.frombuffer(normal(data, facts, ranges([facts])), np.uint8), cv2.IMREAD_COLOR)
    expected = DEEP / 4095 * 255
    assert np.abs(read[..., 0] - expected).max() <= 2, "neither dark nor black"


def test_one_range_for_all_images_that_hot_pixels_do_not_stretch() -> None:
    dark, bright = DEEP // 4, DEEP.copy()
    bright[0, 0] = 65535
    found = [look(by_opencv(".png", values)) for values in (dark, bright)]
    low, high = ranges(found)["uint16"]
    assert low == 0 and 4000 < high < 4096
    means = [
        cv2.imdecode(np.frombuffer(normal(by_opencv(".png", v), f, ranges(found)), np.uint8), 1).mean()
        for v, f in zip((dark, bright), found, strict=True)
    ]
    assert means[1] / means[0] == pytest.approx(4, rel=0.05), "what is brighter stays brighter"


def test_the_conversion_is_said_and_the_same_each_time(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for i in range(3):
        (root / f"images/train/train_{i:02d}.png").write_bytes(by_opencv(".png", np.roll(DEEP, i)))
    found = check_source(root)
    (warning,) = found.warnings
    assert warning.startswith("3 image(s) of uint16 values are converted to 8 bits: 0 becomes black, 4")
    outs = [prepare(root, tmp_path / str(i)) for i in range(2)]
    first, second = (normalised.load(out) for out in outs)
    assert first.digest == second.digest
    assert dict(first.converted) == dict(found.remarks) and list(first.converted.values()) == [3]


FRAMES = {
    "animated GIF, the first picture is taken": ("GIF", False),
    "animated PNG, the first picture is taken": ("PNG", False),
    "animated WEBP, the first picture is taken": ("WEBP", False),
    "TIFF of several pages, the first is taken": ("TIFF", False),
    "JPEG of several pictures, the first is taken": ("MPO", True),
}


@pytest.mark.parametrize("remark", FRAMES)
def test_of_several_pictures_the_first_is_taken_and_it_is_said(remark: str) -> None:
    form, kept = FRAMES[remark]
    first, second = Image.new("RGB", (32, 24), (200, 30, 30)), Image.new("RGB", (32, 24), (30, 200, 30))
    stream = io.BytesIO()
    first.save(stream, form, save_all=True, append_images=[second])
    facts = look(stream.getvalue())
    assert facts.remarks == (remark,) and facts.kept == kept
    read = cv2.imdecode(np.frombuffer(normal(stream.getvalue(), facts, {}), np.uint8), cv2.IMREAD_COLOR)
    assert np.abs(read[12, 16].astype(int) - (30, 30, 200)).max() < 12


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright(form: str, orientation: int) -> None:
    plain = np.zeros((24, 32, 3), np.uint8)
    plain[:12, :16] = (250, 250, 250)  # a mark above on the left
    upright = Image.fromarray(plain)
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # what undoes the orientation
    stored = upright if turned is None else upright.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    stored.save(stream, form, exif=exif)
    facts = look(stream.getvalue())
    assert (facts.width, facts.height) == (32, 24)
    read = cv2.imdecode(np.frombuffer(normal(stream.getvalue(), facts, {}), np.uint8), cv2.IMREAD_COLOR)
    assert read.shape == (24, 32, 3)
    assert read[4, 4].min() > 200 and read[20, 28].max() < 60 and read[4, 28].max() < 60 and read[20, 4].max() < 60


@pytest.mark.parametrize("progressive", [False, True])
def test_a_jpeg_without_its_end_marker_is_whole_and_a_truncated_one_is_not(progressive: bool) -> None:
    data = encoded("JPEG", (200, 160), progressive=progressive)
    for missing in (1, 2):
        facts = look(data[:-missing])
        assert facts.kept and facts.remarks == ("JPEG without its end marker, closed",)
        assert normal(data[:-missing], facts, {}) == data
    for missing in (12, 60, len(data) // 2):
        with pytest.raises(InputError, match="truncated"):
            look(data[:-missing])


def test_what_opencv_cannot_decode_of_a_jpeg_is_refused() -> None:
    """The check decodes to an eighth of the size; the training decodes all of it, and must find as much."""
    rng = random.Random(0)
    outcomes = []
    for i in range(200):
        size, form = (rng.randint(16, 90), rng.randint(16, 90)), {"progressive": i % 2 == 0, "subsampling": i % 3}
        data = bytearray(encoded("JPEG", size, **form))
        if i % 4 == 0:
            del data[rng.randrange(len(data)) :]
        elif i % 4 == 1:
            start = rng.randrange(len(data))
            del data[start : start + rng.randint(1, 40)]
        elif i % 4 == 2:
            for place in rng.choices(range(len(data)), k=rng.randint(1, 20)):
                data[place] = rng.randrange(256)
        try:
            facts = look(bytes(data))
        except InputError:
            outcomes.append(False)
            continue
        read = cv2.imdecode(np.frombuffer(normal(bytes(data), facts, {}), np.uint8), cv2.IMREAD_COLOR)
        assert read is not None and read.shape[1::-1] == (facts.width, facts.height), (i, form)
        outcomes.append(True)
    assert 20 < sum(outcomes) < 180


@pytest.mark.parametrize("form", ["PNG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "AVIF"])
def test_truncated_images_of_every_kind_are_refused(form: str) -> None:
    data = encoded(form, (200, 160))
    with pytest.raises(InputError, match="unreadable or truncated image"):
        look(data[: len(data) * 2 // 3])


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG that says how large it is."""
    import zlib

    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    checked = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + checked + struct.pack(">I", 10**6) + b"IDAT"


@pytest.mark.parametrize(
    ("size", "limit"),
    [((12_000, 8_000), "32,000,000 pixels for an image in a file of"), ((20_000, 10_000), "limit of")],
)
def test_too_many_pixels_name_the_limit(size: tuple[int, int], limit: str) -> None:
    with pytest.raises(InputError) as caught:
        look(png_header(*size) + b"\0" * 2000)
    assert limit in str(caught.value)
    assert f"{size[0] * size[1] // 10**6} megapixels" in str(caught.value) and "tiles" in str(caught.value)


def test_a_large_photograph_is_within_the_limit() -> None:
    size = 96_000_000 // images.PIXELS_A_BYTE + 1
    with pytest.raises(InputError, match="truncated"):  # for what is missing in it, not for its pixels
        look(png_header(12_000, 8_000) + b"\0" * size)


CONTENTS = {
    b"": "an empty file",
    b"<!DOCTYPE html><html>": "a web page or XML",
    b"\0" * 100: "nothing but zeros",
    b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
    b"../.git/annex/objects/SHA256E-s1--0": "git annex get",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_what_is_no_image_is_named_for_what_it_is(content: bytes) -> None:
    with pytest.raises(InputError) as caught:
        look(content)
    assert CONTENTS[content] in str(caught.value)


def test_a_second_check_opens_nothing_and_a_changed_image_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_SETTLED", -(10**12))
    root = write_yolo(tmp_path / "parts")
    digest = source_digest(root)
    first = check_source(root)
    opened = []
    monkeypatch.setattr(images, "look", lambda data, spend=None: (opened.append(data), look(data))[1])
    assert check_source(root) == first and opened == []
    assert source_digest(root) == digest
    write_image(root / "images/train/train_03.png", 4711)
    assert check_source(root) != first and len(opened) == 1
    assert source_digest(root) != digest
    (root / "images/train/train_03.png").write_bytes(b"gone")
    with pytest.raises(InputError, match=r"train_03\.png: unreadable"):
        check_source(root)


def test_a_second_check_reads_no_label_and_a_changed_one_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "_SETTLED", -(10**12))
    root = write_yolo(tmp_path / "parts")
    labels = sorted((root / "labels/train").glob("*.txt"))
    labels[0].write_text("0 0.95 0.5 0.2 0.4\n")  # clipped, which each check is to tell
    first = check_source(root)
    read: list[str] = []
    lines = yolo_layout.lines
    monkeypatch.setattr(yolo_layout, "lines", lambda file, *rest: (read.append(str(file)), lines(file, *rest))[1])
    assert check_source(root) == first
    assert {file for file in read if Path(file) in labels} == {str(labels[0])}
    labels[1].write_text("0 0.4 0.5 0.2 0.4\n")
    assert check_source(root) != first
    labels[1].write_text("9 0.4 0.5 0.2 0.4\n")
    with pytest.raises(InputError, match="class 9 is out of range"):
        check_source(root)


@pytest.mark.parametrize("place", ["file", "damaged", "none"])
def test_without_a_cache_everything_is_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    root = write_yolo(tmp_path / "parts")
    monkeypatch.setattr(known, "_SETTLED", -(10**12))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    if place == "file":
        (tmp_path / "cache").write_text("no folder")
    elif place == "damaged":
        check_source(root)
        for file in (tmp_path / "cache").rglob("*.sqlite"):
            file.write_bytes(b"no database, whatever its name" * 100)
    else:
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.delenv("HOME", raising=False)
        monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    assert used(check_source(root)) == (12, 4)


# B. Rows -------------------------------------------------------------------------------------------------------------

ROWS: dict[str, tuple[tuple[float, ...] | None, str | None, str | None]] = {
    "0 0.5 0.5 0.2 0.4": ((0, 0.5, 0.5, 0.2, 0.4), None, None),
    "1.0 .5 5e-1 0.2 +0.4": ((1, 0.5, 0.5, 0.2, 0.4), None, None),
    "0\u00a00.5\t0.5  0.2 0.4": ((0, 0.5, 0.5, 0.2, 0.4), None, None),
    "0 0.95 0.5 0.2 0.4": ((0, 0.925, 0.5, 0.15, 0.4), "clipped to their image", None),
    "0 0.5 0.5 0 0.4": (None, "left out: without a size", None),
    "0 0.1 0.2 0.5 0.2 0.3 0.6": ((0, 0.3, 0.4, 0.4, 0.4), None, POLYGON),
    "0 0.1 0.2 0.1 0.2 0.1 0.2": (None, "left out: without a size", POLYGON),
    "0 -0.1 0.2 0.5 0.2 0.3 0.6": ((0, 0.25, 0.4, 0.5, 0.4), "clipped to their image", POLYGON),
    "0 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.6": ((0, 0.3, 0.4, 0.4, 0.4), None, ORIENTED),
    "0 0.1 0.2 0.5 0.2 0.5 0.6 0.3 0.7 0.1 0.6": ((0, 0.3, 0.45, 0.4, 0.5), None, POLYGON),
}


@pytest.mark.parametrize("row", ROWS)
def test_rows_are_read(row: str) -> None:
    box, outcome, what = parse_row(row, 2)
    expected = ROWS[row]
    assert (None if box is None else pytest.approx(tuple(box))) == expected[0]
    assert (outcome, what) == expected[1:]


def test_poses_are_read_where_the_dataset_says_so() -> None:
    row = "0 0.5 0.5 0.4 0.4 0.45 0.45 2 0.55 0.55 1 0 0 0"
    assert parse_row(row, 2, keypoints=(3, 3)) == ((0, 0.5, 0.5, 0.4, 0.4), None, POSE)


BAD_ROWS = {
    "0,0.5,0.5,0.1,0.1": "'0,0.5,0.5,0.1,0.1' holds something that is no number",
    "0 0,5 0,5 0,1 0,1": "('0,5'); write blanks between the numbers and a point before their decimals",
    "0 0.5; 0.5; 0.1; 0.1": "a point before their decimals",
    "1_0 0.5 0.5 0.1 0.1": "'1_0' holds something that is no number",
    "0 0.5 0.5 0.1 0_1": "('0_1')",
    "0 ０.5 0.5 0.1 0.1": "write it with the digits 0 to 9",
    "0 0.5 ٠.٥ 0.1 0.1": "write it with the digits 0 to 9",
    "dent 0.5 0.5 0.1 0.1": "class 'dent' is a name; write its number, 0",
    "0x1 0.5 0.5 0.1 0.1": "no number",
    "0 0.5 0.5 0.1 0.1 0.93": "6 columns; write five",
    "0 0.5 0.5 0.4 0.4 0.45 0.45 2 0.55 0.55 1 0 0 0": "a pose of 3 keypoints has; add `kpt_shape: [3, 3]`",
    "0 0.5 0.5 0.4 0.4 0.45 0.45 2 0.55 0.55 2 0.5 0.5 2 0.4 0.4 2": "a pose of 4 keypoints has",
    "0 0.5 0.5 0.4 0.4 0.45 0.45 0.55 0.55 0.5 0.6": "a pose of 3 keypoints has; add `kpt_shape: [3, 2]`",
    "10 10 20 10 20 20 10 20 dent 0": "is an oriented box as DOTA has it",
    "0 120 80 60 40": "as if it were in pixels; divide x and width by the image's width",
    "0 10 20 50 20 30 60": "as if it were in pixels",
    "0 0.5 0.5 -0.1 0.1": "has no size",
    "0 1.5 0.5 0.2 0.2": "lies outside its image",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_bad_rows_are_named_with_file_line_and_value(tmp_path: Path, row: str) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "labels/val/val_01.txt").write_text(f"0 0.5 0.5 0.25 0.5\n{row}\n", encoding="utf-8")
    with pytest.raises(InputError) as caught:
        check_source(root)
    message = str(caught.value)
    assert "labels/val/val_01.txt, line 2: " in message and BAD_ROWS[row] in message


def test_oriented_boxes_and_poses_of_a_dataset_are_named_for_what_they_are(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for file in root.glob("labels/*/*.txt"):
        file.write_text("0 0.3 0.2 0.5 0.4 0.3 0.6 0.1 0.4\n")
    found = check_source(root)
    assert tally(found, "train", "boxes") == {ORIENTED: 12}
    assert "12 rows of train have four corners, as oriented boxes have" in found.warnings[0]
    for file in root.glob("labels/*/*.txt"):
        file.write_text("0 0.5 0.5 0.4 0.4 0.45 0.45 2 0.55 0.55 1\n")
    edit_yaml(root, kpt_shape=[2, 3])
    assert tally(check_source(root), "train", "boxes") == {POSE: 12}


def test_many_clipped_boxes_are_doubted(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    for file in root.glob("labels/train/*.txt"):
        file.write_text("0 0.1 0.1 0.6 0.7\n")  # two corners
    assert "see that they are class, centre and size, not corners" in check_source(root).warnings[0]


# Names ---------------------------------------------------------------------------------------------------------------

NAMES: dict[str, tuple[str, ...]] = {
    "names: [on, off]": ("on", "off"),
    "names: [null, ~]": ("null", "~"),
    "names: [1.0, 1_0]": ("1.0", "1_0"),
    "names: [2024-01-01, 12:30]": ("2024-01-01", "12:30"),
    "names: {'0': dent, '1': hole}": ("dent", "hole"),
    'names: {"1": hole, 0: dent}': ("dent", "hole"),
    "names: [dent, hole]\nnc: '2'": ("dent", "hole"),
    "names: [dent, hole]\nnc: 2.0": ("dent", "hole"),
    "names: [dent, hole]\nnc: ": ("dent", "hole"),
    "names:\n- 0: dent\n- 1: hole": ("dent", "hole"),
    "names: ['  dent ', hole]": ("dent", "hole"),
    "names: [Kratzer-groß, 孔]": ("Kratzer-groß", "孔"),
    "names: classes.txt": ("dent", "hole"),
    "nc: 2": ("class_0", "class_1"),
}


@pytest.mark.parametrize("text", NAMES)
def test_names_are_what_is_written(tmp_path: Path, text: str) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "classes.txt").write_text("dent\nhole\n")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\n{text}\n", encoding="utf-8")
    assert check_source(root).names == NAMES[text]


BAD_NAMES = {
    "names: [dent, '']": "class 1 has an empty name",
    "names: {1: dent, 2: hole}": "names has the keys [1, 2]; number the classes from 0",
    "names: {a: dent, b: hole}": "names has the keys ['a', 'b']",
    "names: [dent, hole]\nnc: two": "nc = two, but there are 2 names",
    "names: {0: dent, 0: hole}": "data.yaml, line 3: key '0' stands there twice",
    "train: images/val\nnames: [dent, hole]": "data.yaml, line 3: key 'train' stands there twice",
    "names: dent, hole": "names = 'dent, hole'",
    "names: [[dent], hole]": "list the class names",
}


@pytest.mark.parametrize("text", BAD_NAMES)
def test_bad_names_are_told(tmp_path: Path, text: str) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "data.yaml").write_text(f"train: images/train\nval: images/val\n{text}\n")
    with pytest.raises(InputError) as caught:
        check_source(root)
    assert BAD_NAMES[text] in str(caught.value)


# COCO ----------------------------------------------------------------------------------------------------------------


def both(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda root: [edit_coco(root, split, change) for split in ("train", "val")]


def text_ids(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image["id"] = str(image["id"])
    for annotation in content["annotations"]:
        annotation.update(image_id=float(annotation["image_id"]), category_id=f"{annotation['category_id']}.0")


def float_sizes(content: dict[str, Any]) -> None:
    for image in content["images"]:
        image.update(width=32.0, height="24")


def names_with(before: str, sep: str = "/") -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            split = image["file_name"].partition("_")[0]
            image["file_name"] = sep.join((before, split, image["file_name"]))

    return change


def only(key: str) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image[key] = image.pop("file_name")

    return change


def parts(root: Path) -> None:
    """Train's annotations in two files, with other ids for the classes in the second."""
    file = root / "annotations/instances_train.json"
    content = json.loads(file.read_text())
    for number, keep in enumerate((range(6), range(6, 12))):
        part = {
            "images": [image for image in content["images"] if image["id"] in keep],
            "annotations": [a for a in content["annotations"] if a["image_id"] in keep],
            "categories": content["categories"],
        }
        if number:
            part = json.loads(json.dumps(part).replace('"category_id": 7', '"category_id": 70'))
            part["categories"] = [{"id": 9, "name": "hole"}, {"id": 70, "name": "dent"}]
        (root / f"annotations/instances_train_{number}.json").write_text(json.dumps(part))
    file.unlink()


def captions_beside(root: Path) -> None:
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        content["annotations"] = [{"id": 1, "image_id": 0, "caption": "a dent"}]
        content.pop("categories")
        (root / f"annotations/captions_{split}.json").write_text(json.dumps(content))


def roboflow(root: Path) -> None:
    for split, folder in (("train", "train"), ("val", "valid")):
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        for category in content["categories"]:
            category["supercategory"] = "parts"
        content["categories"].insert(0, {"id": 0, "name": "parts", "supercategory": "none"})
        renamed(root, f"images/{split}", folder)
        (root / folder / "_annotations.coco.json").write_text(json.dumps(content))
    write_image(root / "test/t.png", 9)
    (root / "test/_annotations.coco.json").write_text(json.dumps({"images": [], "annotations": [], "categories": []}))
    shutil.rmtree(root / "annotations")
    shutil.rmtree(root / "images")


def cvat(root: Path) -> None:
    """Two tasks, each exported on its own; all shapes are masks, which are marked as crowds."""
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        for annotation in content["annotations"]:
            annotation.update(iscrowd=1, segmentation={"counts": [1], "size": [24, 32]}, attributes={"occluded": False})
        renamed(root, f"images/{split}", f"{split}/images/default")
        (root / split / "annotations").mkdir()
        (root / split / "annotations/instances_default.json").write_text(json.dumps(content))
    shutil.rmtree(root / "annotations")


def fiftyone(root: Path) -> None:
    for split in ("train", "val"):
        renamed(root, f"images/{split}", f"{split}/data")
        renamed(root, f"annotations/instances_{split}.json", f"{split}/labels.json")
    shutil.rmtree(root / "annotations")


def macos(root: Path) -> None:
    for split in ("train", "val"):
        (root / f"annotations/._instances_{split}.json").write_bytes(b"\0\5\x16\7")
        (root / f"images/{split}/._{split}_00.png").write_bytes(b"\0\5\x16\7")


def year_in_names(root: Path) -> None:
    for split in ("train", "val"):
        renamed(root, f"images/{split}", f"{split}2017")
        renamed(root, f"annotations/instances_{split}.json", f"annotations/instances_{split}2017.json")


def polygons_only(content: dict[str, Any]) -> None:
    for annotation in content["annotations"]:
        x, y, w, h = annotation.pop("bbox")
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


def no_sizes(content: dict[str, Any]) -> None:
    for image in content["images"]:
        del image["width"], image["height"]


def val_numbered_anew(root: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 1, "name": "dent"}, {"id": 2, "name": "hole"}]
        for annotation in content["annotations"]:
            annotation["category_id"] = {7: 1, 9: 2}[annotation["category_id"]]

    edit_coco(root, "val", change)


def decomposed_names(root: Path) -> None:
    for split in ("train", "val"):
        for path in list((root / "images" / split).iterdir()):
            path.rename(path.with_name(unicodedata.normalize("NFD", "größe ") + path.name))
    both(lambda c: [i.update(file_name=unicodedata.normalize("NFC", "größe ") + i["file_name"]) for i in c["images"]])(
        root
    )


def escaped_names(root: Path) -> None:
    for split in ("train", "val"):
        for path in list((root / "images" / split).iterdir()):
            path.rename(path.with_name("a b " + path.name))
    both(lambda c: [i.update(file_name="a%20b%20" + i["file_name"]) for i in c["images"]])(root)


ODD_COCO: dict[str, tuple[Change, bool]] = {
    "ids as text and as floats": (both(text_ids), False),
    "sizes as floats and text": (both(float_sizes), False),
    "backslashes": (both(names_with("images", "\\")), False),
    "paths of another machine": (both(names_with("/home/me/parts/images")), False),
    "paths that lead out": (both(names_with("../../label-studio/media/images")), False),
    "addresses": (both(names_with("http://images.cocodataset.org")), False),
    "only coco_url": (both(only("coco_url")), False),
    "only path": (both(only("path")), False),
    "names in capitals": (both(lambda c: [i.update(file_name=i["file_name"].upper()) for i in c["images"]]), False),
    "names in another normal form": (decomposed_names, False),
    "escaped names": (escaped_names, False),
    "several files of a split": (parts, False),
    "captions beside": (captions_beside, False),
    "Roboflow": (roboflow, False),
    "CVAT": (cvat, False),
    "FiftyOne": (fiftyone, False),
    "companions of macOS": (macos, False),
    "2017": (year_in_names, False),
    "polygons without boxes": (both(polygons_only), False),
    "no sizes": (both(no_sizes), True),
    "other ids in val": (val_numbered_anew, False),
    "numbers as text": (
        both(lambda c: [a.update(bbox=[str(v) for v in a["bbox"]]) for a in c["annotations"]]),
        False,
    ),
}


@pytest.mark.parametrize("case", ODD_COCO)
def test_dialects_of_coco_read_as_the_plain_one(tmp_path: Path, case: str) -> None:
    change, warned = ODD_COCO[case]
    plain = check_source(write_coco(tmp_path / "plain"))
    root = write_coco(tmp_path / "parts")
    change(root)
    found = check_source(root)
    assert found.names == plain.names == ("dent", "hole") and found.boxes == plain.boxes
    assert {s: {i.sha256 for i in several} for s, several in found.splits.items()} == {
        s: {i.sha256 for i in several} for s, several in plain.splits.items()
    }
    assert bool(found.warnings) == warned, found.warnings


@pytest.mark.parametrize("file", ["annotations/instances_train.json", "annotations/instances_val.json"])
def test_the_json_itself_is_a_dataset(tmp_path: Path, file: str) -> None:
    root = write_coco(tmp_path / "parts")
    found = check_source(root / file)
    assert found.source == "parts" and used(found) == (12, 4)
    roboflow(root)
    assert used(check_source(root / "train/_annotations.coco.json")) == (12, 4)


def one_file(root: Path, name: str) -> Path:
    """One file for all images, as Label Studio and CVAT export them."""
    whole: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for split in ("train", "val"):
        content = json.loads((root / f"annotations/instances_{split}.json").read_text())
        first = len(whole["images"])
        for image in content["images"]:
            whole["images"].append({**image, "id": image["id"] + first, "file_name": f"images\\{image['file_name']}"})
        for annotation in content["annotations"]:
            whole["annotations"].append({**annotation, "image_id": annotation["image_id"] + first})
        whole["categories"] = content["categories"]
        for path in list((root / "images" / split).iterdir()):
            path.rename(root / "images" / path.name)
        (root / "images" / split).rmdir()
    shutil.rmtree(root / "annotations")
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_text(json.dumps(whole))
    return root


@pytest.mark.parametrize("name", ["result.json", "annotations/instances_default.json"])
def test_one_file_for_all_images_gives_its_own_validation_images(tmp_path: Path, name: str) -> None:
    root = one_file(write_coco(tmp_path / "parts"), name)
    found = check_source(root)
    train, val = used(found)
    assert train + val == 16 and val >= 1 and boxes(found) == 32
    assert "no validation images; a fifth of the images is taken for it" in found.warnings[0]
    assert {image.sha256 for image in found.splits["val"]}.isdisjoint(i.sha256 for i in found.splits["train"])
    write_image(root / "images/more.png", 12345)
    again = check_source(root)
    assert [i.sha256 for i in again.splits["val"]] == [i.sha256 for i in found.splits["val"]], "by content alone"
    assert check_source(root / name).images == again.images


def test_val_may_lack_a_category_and_have_one_that_no_box_has(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")

    def change(content: dict[str, Any]) -> None:
        content["categories"] = [{"id": 7, "name": "dent"}, {"id": 8, "name": "unused"}]
        content["annotations"] = [a for a in content["annotations"] if a["category_id"] == 7]

    edit_coco(root, "val", change)
    found = check_source(root)
    assert found.names == ("dent", "hole") and found.boxes["val"] == {"dent": 4, "hole": 0}
    assert found.warnings == ("val holds no box of hole",)


def test_the_root_category_may_be_called_as_a_class(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")

    def change(content: dict[str, Any]) -> None:
        for category in content["categories"]:
            category["supercategory"] = "dent"
        content["categories"].insert(0, {"id": 0, "name": "dent", "supercategory": "none"})

    both(change)(root)
    assert check_source(root).names == ("dent", "hole")
    edit_coco(root, "val", lambda c: c["annotations"][0].update(category_id=0))
    with pytest.raises(InputError, match=r"class name 'dent' stands for \[0, 2\]"):
        check_source(root)


def test_json_of_another_kind_is_named(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    (root / "annotations/instances_train.json").write_text("[]")
    with pytest.raises(InputError, match=r"none for train.*without COCO's lists: annotations/instances_train\.json"):
        check_source(root)


def test_captions_alone_are_no_dataset(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    captions_beside(root)
    for split in ("train", "val"):
        (root / f"annotations/instances_{split}.json").unlink()
    with pytest.raises(InputError, match=r"captions_train\.json: no list 'categories'"):
        check_source(root)
    for split in ("train", "val"):
        content = {"images": [], "categories": [], "annotations": [{"id": 1, "image_id": 1, "segments_info": []}]}
        (root / f"annotations/captions_{split}.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match="no annotation has a category_id; give the annotations of objects"):
        check_source(root)


def test_real_crowds_are_left_out_and_masks_that_are_marked_so_are_not(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    edit_coco(root, "train", lambda c: c["annotations"][0].update(iscrowd=1))
    found = check_source(root)
    assert tally(found, "train", "boxes") == {"used": 23, "left out: crowd regions": 1}
    cvat(root)
    found = check_source(root)
    assert tally(found, "train", "boxes") == {"used, of masks that are marked as crowds": 24}


def test_images_that_no_json_names_are_told(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    write_image(root / "images/train/extra.png", 77)
    write_image(root / "images/test/other.png", 78)
    found = check_source(root)
    assert tally(found, "train", "files") == {"used, with boxes": 12, "skipped: images that no JSON file names": 1}
    assert tally(found, "test", "files") == {"skipped: of a split that is not used": 1}
    (warning,) = found.warnings
    assert "images/train/extra.png" in warning and "add them to the annotations" in warning


def test_files_of_one_split_that_contradict_each_other_are_not_merged(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    content = json.loads((root / "annotations/instances_train.json").read_text())
    content["annotations"][0]["bbox"] = [1, 1, 4, 4]
    (root / "annotations/instances_train_old.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"has other boxes than in annotations/instances_train\.json; keep"):
        check_source(root)


def test_files_of_other_classes_for_the_same_images_are_merged(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    content = json.loads((root / "annotations/instances_train.json").read_text())
    (root / "annotations/instances_train.json").unlink()
    for category in content["categories"]:
        mine = [a for a in content["annotations"] if a["category_id"] == category["id"]]
        part = {**content, "annotations": mine, "categories": [category]}
        (root / f"annotations/instances_train_{category['name']}.json").write_text(json.dumps(part))
    found = check_source(root)
    assert set(found.names) == {"dent", "hole"} and boxes(found) == 32 and found.warnings == ()


def test_a_turned_box_of_cvat_is_the_upright_one_around_it(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    edit_coco(root, "val", lambda c: c["annotations"][0].update(attributes={"rotation": 90.0}))  # 8 x 12 at 12, 6
    found = check_source(root)
    (box,) = (b for b in found.splits["val"][0].boxes if b.label == 0)
    assert tuple(box) == pytest.approx((0, 0.5, 0.5, 12 / 32, 8 / 24))


def test_coco_boxes_that_stick_out_are_clipped_and_counted(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    edit_coco(root, "train", lambda c: c["annotations"][3].update(bbox=[28, 2, 8, 3]))
    found = check_source(root)
    assert tally(found, "train", "boxes") == {"used": 23, "clipped to their image": 1}


def test_a_damaged_json_is_told_not_overlooked(tmp_path: Path) -> None:
    root = write_coco(tmp_path / "parts")
    (root / "annotations/instances_val.json").write_text('{"images": [')
    with pytest.raises(InputError, match=r"annotations/instances_val\.json: not JSON"):
        check_source(root)


# The command ---------------------------------------------------------------------------------------------------------


def many_classes(root: Path, count: int) -> list[str]:
    names = [f"class-{i:04d} with a long name, größer" for i in range(count)]
    edit_yaml(root, names=names)
    (root / "labels/train/train_00.txt").write_text(f"{count - 1} 0.5 0.5 0.25 0.5\n" + "0 0.5 0.5 0.1 0.1\n")
    return names


def command(root: Path, **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, "-m", "yolov8_nas.commands.main", "data", "check", str(root)],
        env={**os.environ, **environment},
        capture_output=True,
        check=False,
    )


@pytest.mark.parametrize(("count", "columns"), [(80, 80), (1203, 80), (80, 40)])
def test_many_classes_fit_into_a_narrow_terminal(tmp_path: Path, count: int, columns: int) -> None:
    root = write_yolo(tmp_path / "parts")
    many_classes(root, count)
    done = command(root, COLUMNS=str(columns))
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode()
    lines = [line for line in text.splitlines() if not line.startswith("warning")]
    assert max(map(len, lines)) <= columns
    for i in (0, 1, count // 2, count - 1):
        assert f"class-{i:04d}" in text
    (last,) = (line for line in lines if line.startswith(f"class-{count - 1:04d}"))
    numbers = [int(word) for word in last.split()[-3:]]
    assert sum(numbers) == 1, "its one box, whole"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_output_that_is_not_utf8(tmp_path: Path, encoding: str) -> None:
    root = write_yolo(tmp_path / "parts")
    edit_yaml(root, names=["größer", "孔"])
    write_image(root / "images/train/größe-孔.png", 3)
    (root / os.fsdecode(b"images/train/bad-\xff.db")).write_bytes(b"x")
    done = command(root, PYTHONIOENCODING=encoding, LC_ALL="C")
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert r"\u5b54" in text and ("größer" in text or r"gr\xf6\xdfer" in text)


def test_data_check_prints_the_ledger(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    (root / "images/train/@eaDir").mkdir()
    (root / "images/val/val_00.png").write_bytes(by_opencv(".png", DEEP))
    text = " ".join(command(root, COLUMNS="200").stdout.decode().split())
    for expected in (
        "train files, in all 13 used, with boxes 12 skipped: hidden files and folders 1",
        "train labels, in all 12 read, with rows 12",
        "train boxes, in all 24 used 24",
        "uint16 converted to 8 bits: 0 becomes black",
        "a deployed model needs its images converted alike",
    ):
        assert expected in text


def test_zip_of_a_mac(tmp_path: Path) -> None:
    root = write_yolo(tmp_path / "parts")
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        for path in sorted(root.rglob("*")):
            archive.write(path, Path("parts") / path.relative_to(root))
            archive.writestr(f"__MACOSX/parts/._{path.name}", b"\0\5\x16\7")
    assert used(check_source(tmp_path / "parts.zip")) == (12, 4)
