"""Signatures of registered versions: on tags, parameters and figures, and through the hashes among them on the files.

The signature is a tag of the version, beside those that it covers. What it does not cover is left out of what a reader
who asks for signatures sees, but for what changes after registering: aliases, why they were given, `recheck`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from yolov8_nas import signing

SIGNATURE: Final = "signature"
"""Tag of a version: its signature."""

CHANGING: Final = ("champion_", "challenger_", "recheck", "state", "model_id", SIGNATURE)
"""How names of tags begin that no signature covers. `model_id` says where files lie that are held against hashes."""

_KIND: Final = "version"


@dataclass(frozen=True)
class Sealed:
    """What a signature on a version vouches for.

    Attributes:
        model: Name of the registered model.
        tags: Tags of the version.
        params: What the detector is.
        metrics: What was measured of it.
    """

    model: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    metrics: Mapping[str, float]

    @classmethod
    def of(cls, model: str, tags: Mapping[str, str], params: Mapping[str, str], metrics: Mapping[str, float]) -> Sealed:
        """All of a version that can be signed."""
        lasting = {key: value for key, value in tags.items() if not key.startswith(CHANGING)}
        return cls(model, lasting, dict(params), {key: float(value) for key, value in metrics.items()})

    def sign(self) -> str | None:
        """The tag `SIGNATURE`; nothing where this process has no key to sign with."""
        signature = signing.keys().sign(_KIND, self._statement())
        if signature is None:
            return None
        return json.dumps({**signature, "covers": {part: sorted(values) for part, values in self._parts().items()}})

    def fault(self, tag: str | None) -> str | None:
        """Why this is not to be trusted; nothing where it is, or where nobody asks for signatures."""
        return self._checked(tag)[0]

    def checked(self, tag: str | None) -> tuple[str | None, Sealed]:
        """As `fault`, and what the signature covers: all there is where nobody asks for signatures."""
        return self._checked(tag)

    def _checked(self, tag: str | None) -> tuple[str | None, Sealed]:
        keys = signing.keys()
        if not keys:
            return None, self
        if tag is None:
            return keys.fault(_KIND, None, None), self
        try:
            signature = json.loads(tag)
            covered = Sealed(
                self.model,
                *(
                    {name: values[name] for name in map(str, signature["covers"][part])}
                    for part, values in self._parts().items()
                ),
            )
        except KeyError as error:
            return f"its signature covers {error}, which is not there", self
        except (ValueError, TypeError, RecursionError):
            return "its signature is none", self
        return keys.fault(_KIND, covered._statement(), signature), covered

    def _parts(self) -> dict[str, Mapping[str, Any]]:
        return {"tags": self.tags, "params": self.params, "metrics": self.metrics}

    def _statement(self) -> dict[str, Any]:
        return {"model": self.model, **{part: dict(values) for part, values in self._parts().items()}}
