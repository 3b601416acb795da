"""JSON that is read item by item is what Python's own decoder reads, wherever a block of the file ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from yolov8_nas.data import json_lists
from yolov8_nas.data.coco_rows import Annotations
from yolov8_nas.data.json_lists import read_lists
from yolov8_nas.errors import InputError

WHOLE = {
    "info": {"a": [1, {"b": None}], "text": 'with "quotes", \\ backslashes [ { ] } and commas,'},
    "images": [{"id": 1, "file_name": "ä\n.jpg"}, {"id": -2.5e10, "file_name": "\\"}],
    "licenses": [1, 22, 333.25, True, None, "x"],
    "annotations": [{"id": i, "bbox": [0.125 * i, i, 1e-9, 2]} for i in range(5)],
    "version": 1234567,
    "categories": [],
}


def _read(path: Path, text: bytes | str, **bounds: int) -> dict[str, Any] | None:
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    lists = dict.fromkeys(("images", "annotations", "categories"), list)
    return read_lists(path, "x.json", lists, **{"most_bytes": 10_000, "most_values": 1000, **bounds})


@pytest.fixture(params=[1, 2, 3, 7, 64, 4096])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Files are read in blocks of so many bytes."""
    monkeypatch.setattr(json_lists, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_lists_are_read_as_json_reads_them(tmp_path: Path, block: int, indent: int | None, encoding: str) -> None:
    if encoding == "utf-16" and block == 1:
        pytest.skip("a mark of two bytes needs a block of two")
    text = json.dumps(WHOLE, indent=indent, ensure_ascii=False).encode(encoding)
    found = _read(tmp_path / "x.json", text)
    assert found is not None
    assert {key: found[key] for key in WHOLE if key != "licenses"} == {
        k: v for k, v in WHOLE.items() if k != "licenses"
    }


def test_what_python_writes_is_read(tmp_path: Path, block: int) -> None:
    found = _read(tmp_path / "x.json", '{"images": [NaN, -Infinity, "\\ud800"], "images": [1], "annotations": 7} ')
    assert found == {"images": [1], "annotations": 7}, "of a key that stands there twice the last counts"


@pytest.mark.parametrize("text", ["[1, 2", "[]", "7", '"x"', "null"])
def test_a_file_without_an_object_holds_no_lists(tmp_path: Path, block: int, text: str) -> None:
    assert _read(tmp_path / "x.json", text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "tru",
        '{"images": [1, 2',
        '{"images": [1 2]}',
        '{"images": [1, ]}',
        '{"images": [{"a": "b]}',
        '{"images": [{"a": tru}]}',
        '{"images": [],}',
        "{images: []}",
        '{"images" []}',
        '{"images": []} x',
        '{"a":\n\n [1,\n  2,,]}',
        '{"a": "\\x"}',
        '{"images": [[1, 2}]',
        '{"images": [1]]',
    ],
)
def test_what_is_no_json_is_named_with_its_place(tmp_path: Path, block: int, text: str) -> None:
    with pytest.raises(ValueError, match="line") as expected:
        json.loads(text)
    with pytest.raises(InputError, match=r"x\.json: not JSON \(.*line \d+ column \d+") as raised:
        _read(tmp_path / "x.json", text)
    line, place = (getattr(expected.value, name) for name in ("lineno", "pos"))
    told = str(raised.value).partition(": line ")[2]
    assert told.startswith(f"{line} column ")
    assert abs(int(told.partition("(char ")[2].partition(")")[0]) - place) <= 1


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"images": [' + "0," * 1000 + "0]}", "values, more than 1,000"),
        ('{"images": ' + "[" * 70 + "]" * 70 + "}", "nested deeper than 64"),
        ('{"a": "' + "x" * 10_000 + '"}', "more than 10,000 bytes"),
        ('{"images": [{"id": ' + "1" * 30 + "}]}", r"an integer of (2|3)\d digits"),
    ],
)
def test_a_bound_is_held_before_the_value_is_built(tmp_path: Path, block: int, text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        _read(tmp_path / "x.json", text)


def test_an_entry_that_never_ends_is_not_gathered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_lists, "BLOCK", 16)
    monkeypatch.setattr(json_lists, "LARGEST_ITEM", 100)
    with pytest.raises(InputError, match="an entry of more than 100 characters at char 11"):
        _read(tmp_path / "x.json", '{"images":["' + "x" * 5000 + '"]}')


def test_annotations_come_back_as_they_were_read() -> None:
    common = {"id": 1, "image_id": 2, "category_id": 3, "bbox": [1, 2.0, 3.5, 4], "iscrowd": 0}
    entries: list[dict[str, Any]] = [
        common,
        {**common, "iscrowd": 1},
        {**common, "attributes": {"occluded": False}},
        {**common, "attributes": {"rotation": 30.0}},
        {**common, "ignore": 1},
        {**common, "id": "a-1", "image_id": "7"},
        {**common, "bbox": [1, 2, float("nan"), 4]},
        {**common, "bbox": [1, 2, 10**300, 4]},
        {**common, "bbox": "none", "image_id": None},
        {**common, "bbox": [], "segmentation": [[0, 0, 10, 0, 10, 5]]},
        {},
    ]
    rows = Annotations()
    for entry in entries:
        rows.append(entry)
    assert rows.sound
    assert len(rows) == len(entries)
    assert repr(rows[0].corners) == "[1, 2.0, 3.5, 4]", "as it is written, for messages"
    assert [row.crowd for row in rows] == [False, True, *[False] * 9]
    assert [row.attributes for row in rows] == [False, False, True, True, *[False] * 7]
    assert [row.rotation for row in rows] == [None, None, None, 30.0, *[None] * 7]
    assert [row.ignored for row in rows] == [False] * 4 + [True] + [False] * 6
    assert [row.id for row in rows] == [1] * 5 + ["a-1"] + [1] * 4 + [None]
    assert list(rows.images()) == [2] * 5 + [7] + [2] * 2 + [None, 2, None]
    assert rows.categories() == {3: 10, None: 1}
    assert (rows[9].corners, rows[9].outlined) == ([0.0, 0.0, 10.0, 5.0], True)
    assert rows[7].corners == [1, 2, 10**300, 4]
    rows.append(["no object"])
    assert not rows.sound
