"""Search spaces and architectures: what can be found, what it consists of, what limits it, what it costs on paper."""

from yolov8_nas.space.space import (
    BLOCKS,
    CONVS,
    FACTORS,
    OPERATORS,
    PARTS,
    SCALES,
    Architecture,
    Block,
    Dimension,
    SearchSpace,
    SpaceError,
    attention_heads,
    is_backbone,
    rescale,
    stock_architecture,
)

__all__ = [
    "BLOCKS",
    "CONVS",
    "FACTORS",
    "OPERATORS",
    "PARTS",
    "SCALES",
    "Architecture",
    "Block",
    "Dimension",
    "SearchSpace",
    "SpaceError",
    "attention_heads",
    "is_backbone",
    "rescale",
    "stock_architecture",
]
