"""Runs and schedules on a Kubeflow server."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import kfp_server_api

from pipelines.client import Server, made_or_found
from pipelines.compile import NAME, compile_pipeline, require_digests, tags_of, version_of
from pipelines.request import Request
from yolov8_nas.errors import InputError

SERVICE_ACCOUNT: Final = "yolov8-nas-runner"
EXPERIMENT: Final = "yolov8-nas"


@dataclass(frozen=True)
class Version:
    """A version of the pipeline on a server.

    Attributes:
        name: Its name, made from its content.
        pipeline_id: The pipeline's id.
        id: Its own id.
        new: Whether it was uploaded just now.
    """

    name: str
    pipeline_id: str
    id: str
    new: bool


@contextmanager
def package() -> Iterator[tuple[Path, str]]:
    """The compiled pipeline for a cluster, and its version.

    Raises:
        InputError: An image is not named by digest.
    """
    require_digests()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "pipeline.yaml"
        compile_pipeline(file)
        yield file, version_of(file)


def upload(server: Server) -> Version:
    """See that the server has this pipeline in this version; equal content is uploaded once.

    Raises:
        InputError: The server refused.
    """
    with package() as (file, name), server.told("upload the pipeline"):
        pipeline = server.pipeline(NAME)
        if pipeline is None:
            # kfp's upload_pipeline would make a first version under the pipeline's name, beside ours.
            body = kfp_server_api.V2beta1Pipeline(display_name=NAME, name=NAME, namespace=server.namespace)
            api = server.client._pipelines_api
            pipeline = made_or_found(lambda: api.pipeline_service_create_pipeline(body), lambda: server.pipeline(NAME))
        number = pipeline.pipeline_id
        found = server.version(number, name)
        made = found or made_or_found(
            lambda: server.client._upload_api.upload_pipeline_version(  # kfp's own method knows no tags
                str(file), name=name, pipelineid=number, tags=json.dumps(tags_of(name))
            ),
            lambda: server.version(number, name),
        )
        return Version(name, pipeline.pipeline_id, made.pipeline_version_id, new=found is None)


def submit(server: Server, request: Request, version: Version, experiment: Any, service_account: str) -> Any:
    """Start a run.

    Raises:
        InputError: The server refused.
    """
    with server.told("start a run"):
        return server.client.run_pipeline(
            experiment.experiment_id,
            request.config.name,
            params=request.parameters,
            pipeline_id=version.pipeline_id,
            version_id=version.id,
            service_account=service_account,
        )


def link(server: Server, run_id: str, ui: str | None) -> str:
    """Where people see a run."""
    return f"{(ui or server.host).rstrip('/')}/#/runs/details/{run_id}"


@dataclass(frozen=True)
class Schedule:
    """A recurring run.

    Attributes:
        name: Its name; there is one of a name in an experiment.
        cron: Six fields, in UTC.
        enabled: Whether it starts runs.
    """

    name: str
    cron: str
    enabled: bool = True


def schedule(
    server: Server, request: Request, version: Version, experiment: Any, service_account: str, asked: Schedule
) -> str:
    """Create a recurring run, or replace the one of the name; one that is as asked stays.

    There is no call to change one. The new one is made before the old ones go, so that none is lost on the way.

    Returns:
        `created`, `replaced` or `unchanged`.

    Raises:
        InputError: The server refused.
    """
    with server.told("schedule runs"):
        old = [one for one in _recurring(server, experiment.experiment_id) if one.display_name == asked.name]
        same = [one for one in old if _as_asked(one, request, version, service_account, asked)]
        if not same:
            server.client.create_recurring_run(
                experiment.experiment_id,
                asked.name,
                cron_expression=asked.cron,
                max_concurrency=1,
                no_catchup=True,
                params=request.parameters,
                pipeline_id=version.pipeline_id,
                version_id=version.id,
                enabled=asked.enabled,
                service_account=service_account,
            )
        superfluous = [one for one in old if one not in same[:1]]
        for one in superfluous:
            server.client.delete_recurring_run(one.recurring_run_id)
    if same:
        return "unchanged"
    return "replaced" if old else "created"


def _recurring(server: Server, experiment_id: str) -> Iterator[Any]:
    token = ""
    while True:
        answer = server.client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment_id)
        yield from answer.recurring_runs or []
        token = answer.next_page_token or ""
        if not token:
            return


def _as_asked(one: Any, request: Request, version: Version, service_account: str, asked: Schedule) -> bool:
    trigger = one.trigger and one.trigger.cron_schedule
    reference = one.pipeline_version_reference
    return bool(
        trigger
        and trigger.cron == asked.cron
        and reference
        and reference.pipeline_version_id == version.id
        and one.runtime_config
        and one.runtime_config.parameters == request.parameters
        and one.service_account == service_account
        and (one.status == "ENABLED") == asked.enabled
    )


_FIELDS: Final = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day", 1, 31, ()),
    ("month", 1, 12, ("JAN", "FEB", "MAR", "APR", "MAY", "JUN", "JUL", "AUG", "SEP", "OCT", "NOV", "DEC")),
    ("weekday", 0, 6, ("SUN", "MON", "TUE", "WED", "THU", "FRI", "SAT")),
)
_LONGEST_MONTHS: Final = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)
_PART: Final = re.compile(r"^(?:(\*|\?)|(\w+)(?:-(\w+))?)(?:/(\d+))?$")


def cron(expression: str) -> str:
    """A schedule in the six fields that Kubeflow takes: second, minute, hour, day, month, weekday.

    Args:
        expression: These, or the five of cron without the second.

    Raises:
        InputError: It does not parse; the field is named.
    """
    fields = expression.split()
    if len(fields) == 5:
        fields = ["0", *fields]
    if len(fields) != 6:
        raise InputError(
            f'--cron {expression!r}: {len(fields)} fields; write five, for example "0 3 * * 1" (Mondays at 3:00)'
        )
    for text, (name, low, high, names) in zip(fields, _FIELDS, strict=True):
        for part in text.split(","):
            if fault := _fault(part, low, high, names):
                raise InputError(f"--cron {expression!r}: {name} {part!r}: {fault}; a {name} is {low} to {high}")
    if not _ever(*fields[3:]):
        raise InputError(
            f"--cron {expression!r}: never comes, since no such month has such a day; correct day or month"
        )
    return " ".join(fields)


def _ever(day: str, month: str, weekday: str) -> bool:
    """Whether there is such a day. Where day and weekday are both named, Kubeflow takes either."""
    free = ("*", "?")
    if day.split("/")[0] in free or weekday.split("/")[0] not in free:
        return True
    days, months = (_numbers(text, *_FIELDS[field][1:]) for text, field in ((day, 3), (month, 4)))
    return any(day <= _LONGEST_MONTHS[month - 1] for day in days for month in months)


def _numbers(text: str, low: int, high: int, names: tuple[str, ...]) -> set[int]:
    """The numbers that a field stands for."""

    def number(end: str) -> int:
        return int(end) if end.isdigit() else names.index(end.upper()) + low

    found: set[int] = set()
    for part in text.split(","):
        match = _PART.match(part)
        assert match is not None
        if match[1]:
            first, last = low, high
        else:
            first = number(match[2])
            last = number(match[3]) if match[3] else high if match[4] else first
        found.update(range(first, last + 1, int(match[4] or 1)))
    return found


def _fault(part: str, low: int, high: int, names: tuple[str, ...]) -> str | None:
    match = _PART.match(part)
    if not match:
        return "does not parse"
    ends = []
    for end in (match[2], match[3]):
        if end is None:
            continue
        number = int(end) if end.isdigit() else names.index(end.upper()) + low if end.upper() in names else None
        if number is None:
            return "is unknown"
        if not low <= number <= high:
            return "is out of range"
        ends.append(number)
    if len(ends) == 2 and ends[0] > ends[1]:
        return "ends before it begins"
    return "steps by nothing" if match[4] == "0" else None
