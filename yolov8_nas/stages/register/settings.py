"""What the registration of a model depends on."""

from __future__ import annotations

from yolov8_nas.config import Precision, RunConfig, TargetConfig
from yolov8_nas.runner.settings import StageSettings


class Asked(StageSettings):
    """What the configuration tells of a registration.

    Attributes:
        model: Name of the registered model.
        experiment: MLflow experiment.
        space: Name of the search space.
        imgsz: Side of the square network input in pixels.
        seed: Seed of the run.
        precision: Precision asked for.
        constraints: Hard limits, as they were asked for.
        batch: Images per inference.
        data_license: Licence of the dataset; nothing where nobody has told it.
    """

    model: str
    experiment: str
    space: str
    imgsz: int
    seed: int
    precision: Precision
    constraints: tuple[str, ...]
    batch: int
    data_license: str | None = None


class RegisterSettings(Asked):
    """Settings of a registration, with what only the run knows.

    Attributes:
        run_id: Name of the run.
        tracking_uri: The tracking server, as `tracking.resolve_uri` gave it.
        mlflow_run: The parent run, as `tracking.open_run` gave it.
        label: Label of the target.
    """

    run_id: str
    tracking_uri: str
    mlflow_run: str
    label: str


def settings(config: RunConfig, target: TargetConfig | None) -> Asked:
    """What a run and a target tell of the registration."""
    assert target is not None
    return Asked(
        model=config.name,
        experiment=config.tracking.experiment,
        space=config.space,
        imgsz=config.imgsz,
        seed=config.seed,
        precision=target.precision,
        constraints=target.constraints,
        batch=target.batch,
        data_license=config.data_license,
    )
