"""What the results of stages depend on: frozen models, whose canonical JSON goes into the key of a result.

A stage's settings hold all that its result depends on beside its inputs, and nothing else. They are light to import:
a stage whose result is there already needs neither torch nor Ultralytics.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, JsonValue, PlainSerializer, PlainValidator

from yolov8_nas.space import SearchSpace


class StageSettings(BaseModel):
    """Settings of a stage; those of a stage that depends on nothing but its inputs have no fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def plain(self) -> dict[str, JsonValue]:
        """The settings as plain JSON values, from which a model of this kind can be made again."""
        return self.model_dump(mode="json")


def _space(given: object) -> SearchSpace:
    return given if isinstance(given, SearchSpace) else SearchSpace.from_dict(given)


Space = Annotated[SearchSpace, PlainValidator(_space), PlainSerializer(SearchSpace.to_dict)]
"""A search space as a field of settings; in JSON its plain description."""
