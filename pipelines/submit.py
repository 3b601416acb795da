"""Runs and schedules on a Kubeflow server."""

from __future__ import annotations

import functools
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import kfp_server_api

from pipelines.client import PassingError, Server
from pipelines.compile import NAME, compile_pipeline, require_digests, version_of
from pipelines.pipeline import yolov8_nas
from pipelines.request import Request
from yolov8_nas.errors import InputError

SERVICE_ACCOUNT: Final = "yolov8-nas-runner"
EXPERIMENT: Final = "yolov8-nas"

_ITERATION: Final = re.compile(r"\((\d+):\d+\)$")  # how Argo names what it repeats
_ENDED: Final = ("SUCCEEDED", "FAILED", "CANCELED", "SKIPPED")


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
            pipeline = server.client._pipelines_api.pipeline_service_create_pipeline(body)
        found = server.version(pipeline.pipeline_id, name)
        made = found or server.client.upload_pipeline_version(
            str(file), pipeline_version_name=name, pipeline_id=pipeline.pipeline_id
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


def watch(
    server: Server,
    run_id: str,
    labels: Sequence[str],
    tell: Callable[[str], None],
    every: float,
    patience: float = 900.0,
) -> str:
    """Follow a run to its end.

    Args:
        server: The server.
        run_id: The run.
        labels: Labels of its targets, in the order of the loops over them.
        tell: Told of every step that begins or ends.
        every: Seconds between two looks.
        patience: Seconds for which the server may fail to answer before this gives up; the run goes on without it.

    Returns:
        The state it ended in.

    Raises:
        InputError: The server refused, or did not answer for too long.
    """
    known: dict[str, str] = {}
    silent_since: float | None = None
    while True:
        try:
            with server.told("follow the run"):
                run = server.client.get_run(run_id)
        except PassingError as error:
            now = time.monotonic()
            if silent_since is None:
                silent_since = now
                tell(f"{error}; the run goes on, and is asked for again")
            if now - silent_since > patience:
                raise
            time.sleep(every)
            continue
        silent_since = None
        tasks = (run.run_details and run.run_details.task_details) or []
        for task, name in _named_steps(tasks, labels):
            state = str(task.state or "PENDING")
            if known.get(task.task_id) != state:
                known[task.task_id] = state
                why = task.error.message if task.error and task.error.message else ""
                tell(f"{name}: {state.lower()}" + (f" ({' '.join(why.split())})" if why else ""))
        if run.state in _ENDED:
            if run.error and run.error.message:
                tell(" ".join(run.error.message.split()))
            return str(run.state)
        time.sleep(every)


def _named_steps(tasks: Sequence[Any], labels: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """The steps that people know among what a server calls tasks, each with a name of its own.

    A server makes a task of every node of Argo's: of the drivers of steps, of loops and their iterations, conditions
    and nested pipelines, too. A step's own has the name of the step in the pipeline. Two targets' steps have the same
    one; which target's it is says the iteration that it hangs below, by its number.
    """
    steps, in_loops = _steps()
    above: dict[str, list[Any]] = {}
    for task in tasks:
        for child in task.child_tasks or []:
            above.setdefault(child.pod_name or child.task_id, []).append(task)
    for task in sorted(tasks, key=lambda task: str(task.create_time)):
        title = steps.get(task.display_name)
        if title is None:
            continue
        number = _iteration(task, above) if task.display_name in in_loops else None
        known = number is not None and number < len(labels)
        yield task, f"{title}, {labels[number]}" if known and number is not None else title


def _iteration(task: Any, above: Mapping[str, Sequence[Any]]) -> int | None:
    """The number of the nearest iteration that a task hangs below."""
    seen: set[str] = set()
    row = [task]
    while row:
        next_row: list[Any] = []
        for one in row:
            if match := _ITERATION.search(one.display_name or ""):
                return int(match[1])
            for key in (one.pod_name, one.task_id):
                if key and key not in seen:
                    seen.add(key)
                    next_row += above.get(key, [])
        row = next_row
    return None


@functools.cache
def _steps() -> tuple[Mapping[str, str], frozenset[str]]:
    """What people call each step, by its name in the pipeline; and the names of those that run once a target."""
    spec = yolov8_nas.pipeline_spec
    dags = [component.dag for component in (spec.root, *spec.components.values()) if component.dag.tasks]
    tasks = [task for dag in dags for task in dag.tasks.items()]
    titles = {
        name: task.task_info.name for name, task in tasks if spec.components[task.component_ref.name].executor_label
    }
    within: set[str] = set()

    def enter(component: str) -> None:
        for name, task in spec.components[component].dag.tasks.items():
            within.add(name)
            enter(task.component_ref.name)

    for _, task in tasks:
        if task.WhichOneof("iterator"):
            enter(task.component_ref.name)
    return titles, frozenset(within & titles.keys())


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
