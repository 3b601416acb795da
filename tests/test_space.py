"""Spaces and architectures: round trips, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from yolov8_nas.space import (
    FACTORS,
    OPERATORS,
    Architecture,
    Head,
    SearchSpace,
    SpaceError,
    rescale,
    stock_architecture,
)

NAMES = ("tiny", *(f"yolov8{scale}{kind}" for scale in "nsml" for kind in ("", "-mixed")))
TINY = SearchSpace.load("tiny")


@pytest.mark.parametrize("name", NAMES)
def test_built_in_spaces(name):
    space = SearchSpace.load(name)
    assert space.name == name
    assert space.stock in space
    assert space.decode(space.encode(space.stock)) == space.stock
    assert SearchSpace.from_dict(json.loads(json.dumps(space.to_dict()))) == space
    for architecture in (space.largest(), space.smallest()):
        assert architecture in space
    for block in space.largest().blocks:
        assert space.stock.blocks[0].depth <= block.depth and OPERATORS.index(block.operator) >= OPERATORS.index(
            "conv3"
        )
    assert space.stock.head == space.largest().head == Head() and space.smallest().head == Head("dwsep3", 8)
    rescaled = space.rescaled()
    assert len(rescaled) == len(FACTORS) == 8 and rescaled[-1] == space.stock
    assert rescaled == [rescale(space.stock, factor) for factor in FACTORS]


@pytest.mark.parametrize("scale", "nsml")
def test_default_spaces_keep_what_stock_has_learned(scale):
    space = SearchSpace.load(f"yolov8{scale}")
    largest, stock = space.largest(), space.stock
    assert largest.convs == stock.convs and largest.sppf_width == stock.sppf_width
    for mine, its in zip(largest.blocks, stock.blocks, strict=True):
        assert (mine.depth, mine.width, mine.operator) == (its.depth, its.width, "conv3")
        assert mine.expansion > its.expansion
    assert any(block.depth == 0 for block in space.smallest().blocks)


@given(st.tuples(*(st.integers(0, len(d.options) - 1) for d in TINY.dimensions)))
def test_round_trips(genes):
    architecture = TINY.decode(genes)
    assert TINY.encode(architecture) == genes
    again = Architecture.from_dict(json.loads(json.dumps(architecture.to_dict())))
    assert again == architecture and again.digest == architecture.digest
    for largest, smallest, block in zip(
        TINY.largest().blocks, TINY.smallest().blocks, architecture.blocks, strict=True
    ):
        assert smallest.depth <= block.depth <= largest.depth
        assert 8 <= smallest.hidden <= block.hidden <= largest.hidden and block.hidden % 8 == 0


def test_descriptions_older_than_attention_have_none():
    written = TINY.stock.to_dict()
    del written["attention"]
    assert Architecture.from_dict(written) == TINY.stock


def test_without_a_word_on_the_head_it_is_stock_s():
    written = TINY.stock.to_dict()
    del written["detect"]
    assert Architecture.from_dict(written) == TINY.stock
    space = TINY.to_dict()
    del space["detect"]
    without = SearchSpace.from_dict(space)
    assert {without.sample(np.random.default_rng(i)).head for i in range(20)} == {Head()}
    assert SearchSpace.from_dict(json.loads(json.dumps(without.to_dict()))) == without != TINY


def test_digests_tell_architectures_apart():
    rng = np.random.default_rng(0)
    drawn = {TINY.sample(rng) for _ in range(100)}
    assert len({architecture.digest for architecture in drawn}) == len(drawn) > 90


def test_stock_widths_are_those_of_ultralytics():
    n, m = stock_architecture("n"), stock_architecture("m")
    assert n.convs == (16, 32, 64, 128, 256, 64, 128)
    assert [(b.depth, b.width, b.hidden) for b in n.blocks[:4]] == [
        (1, 32, 16),
        (2, 64, 32),
        (2, 128, 64),
        (1, 256, 128),
    ]
    assert (m.convs[4], m.sppf_width, m.blocks[1].depth) == (576, 576, 4)


def changed(**changes) -> dict:
    return {**TINY.to_dict(), **changes}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "expected a mapping"),
        (changed(extra=1), r"unknown \['extra'\]"),
        ({"name": "x"}, r"missing \['scale'"),
        (changed(scale="x"), "'x' is not one of n, s, m, l"),
        (changed(convs=TINY.to_dict()["convs"] | {"stem": [20]}), "stem: 20 .* use 24"),
        (changed(convs=TINY.to_dict()["convs"] | {"stem": [24]}), "does not contain stock YOLOv8n: stem = 16"),
        (changed(convs=TINY.to_dict()["convs"] | {"stem": [16, 16]}), "names an option twice"),
        (changed(convs=TINY.to_dict()["convs"] | {"stem": []}), "expected a list"),
        (changed(sppf={"kernel": [4, 5], "width": [256]}), "even kernel"),
        (changed(attention=[0, 5]), "attention: 5 is not a number"),
        (changed(detect={"classes": ["conv3"]}), r"detect: missing \['reg_max'\]"),
        (
            changed(detect={"classes": ["conv3", "conv5"], "reg_max": [16]}),
            "detect.classes: 'conv5' is not one of dwsep3",
        ),
        (changed(detect={"classes": ["conv3"], "reg_max": [16, 32]}), "detect.reg_max: 32 is not a number"),
        (changed(detect={"classes": ["dwsep3"], "reg_max": [16]}), "does not contain stock YOLOv8n: detect.classes"),
        (changed(attention=[1]), "does not contain stock YOLOv8n: attention = 0"),
        (
            changed(attention=[0, 1], sppf={"kernel": [5], "width": [256, 448]}),
            "sppf.width: 448 leaves attention 224 channels for 3 heads of equal size",
        ),
    ],
)
def test_unusable_spaces(data, message):
    with pytest.raises(SpaceError, match=message):
        SearchSpace.from_dict(data)


@pytest.mark.parametrize(
    ("part", "options", "message"),
    [
        ("operator", ["conv3", "conv7"], "'conv7' is not one of"),
        ("operator", ["conv3", "dilated3"], "no stock module with a shortcut"),
        ("depth", [1, -1], "-1 is not a number"),
        ("depth", [2, True], "True is not a number"),
        ("expansion", [0.5, 1.5], "1.5 is not a number"),
        ("width", [32, 12], "12 channels are no multiple of 8"),
    ],
)
def test_unusable_blocks(part, options, message):
    blocks = TINY.to_dict()["blocks"]
    blocks["backbone_p2"] |= {part: options}
    with pytest.raises(SpaceError, match=f"backbone_p2.{part}: .*{message}"):
        SearchSpace.from_dict(changed(blocks=blocks))


def test_space_files(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(TINY.to_dict()))
    assert SearchSpace.load(path) == TINY
    path.write_text("name: [")
    with pytest.raises(SpaceError, match=r"mine\.yaml: not YAML"):
        SearchSpace.load(path)
    with pytest.raises(SpaceError, match=r"no space 'huge': give one of tiny, yolov8l"):
        SearchSpace.load("huge")


def test_genes_and_architectures_that_do_not_fit():
    genes = TINY.encode(TINY.stock)
    with pytest.raises(SpaceError, match="genes for"):
        TINY.decode(genes[:-1])
    with pytest.raises(SpaceError, match=r"stem: gene 9 is not in 0\.\.1"):
        TINY.decode((9, *genes[1:]))
    with pytest.raises(SpaceError, match="not an architecture"):
        Architecture.from_dict({"convs": {}})
    assert stock_architecture("s") not in TINY
