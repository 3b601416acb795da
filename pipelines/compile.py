"""The compiled pipeline: its YAML, its version, and the same as resources of Kubernetes."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Final

import yaml
from kfp import compiler
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from components import images
from pipelines.pipeline import yolov8_nas
from yolov8_nas.errors import InputError
from yolov8_nas.files import canonical_digest

NAME: Final = "yolov8-nas"
"""Name of the pipeline on a server."""

_DIGEST_SHOWN: Final = 12  # letters of a digest; a tag has room for 63


def compile_pipeline(out: Path) -> None:
    """Write the compiled pipeline to a file."""
    compiler.Compiler().compile(yolov8_nas, str(out))


def version_of(package: Path) -> str:
    """The name of a version: that of this package and a digest of the content, so that equal content has one name."""
    content = list(yaml.safe_load_all(package.read_text()))  # the order within comments is another one each time
    return f"{version('yolov8-nas')}-{canonical_digest(content)[:12]}"


def tags_of(name: str) -> dict[str, str]:
    """Tags of a version, by which people find it on a server: the release, the content, and the images it runs.

    Args:
        name: Name of the version, from `version_of`.
    """
    release, _, content = name.rpartition("-")
    digests = {f"image-{kind}": image.rpartition(":")[2][:_DIGEST_SHOWN] for kind, image in images.IMAGES.items()}
    return {"release": release, "content": content, **digests}


def write_manifest(package: Path, folder: Path, namespace: str | None) -> Path:
    """Write the pipeline as Pipeline and PipelineVersion, for a server that keeps pipelines in Kubernetes.

    Args:
        package: The compiled pipeline, which names the version.
        folder: Folder to write to; made if missing.
        namespace: Namespace of the resources; nothing for that of whoever applies them.

    Returns:
        The file.
    """
    name = f"{NAME}-{version_of(package)}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    options = KubernetesManifestOptions(
        pipeline_name=NAME,
        pipeline_version_name=name.replace(".", "-"),
        pipeline_version_display_name=name,
        namespace=namespace,
        include_pipeline_manifest=True,
    )
    compiler.Compiler().compile(
        yolov8_nas, str(file), kubernetes_manifest_format=True, kubernetes_manifest_options=options
    )
    return file


def floating_images() -> list[str]:
    """The kinds of image that are not named by digest."""
    return [kind for kind, image in images.IMAGES.items() if not images.by_digest(image)]


def require_digests() -> None:
    """Refuse to give a cluster an image that can become another one under the same name.

    Raises:
        InputError: An image is not named by digest.
    """
    if floating := floating_images():
        raise InputError(
            f"image {', '.join(floating)}: not named by digest ({images.IMAGES[floating[0]]}); push them and write "
            f"{images.FILE}, or set {images.VARIABLE}_{floating[0].upper()}=NAME@sha256:DIGEST"
        )
