"""Pin what the images are made from, build them, and note their digests; needs docker and no Python package.

python3 images/build.py --pin                            once, and to renew: digests into pins.json, tensorrt.txt
python3 images/build.py [IMAGE]...                       build for this machine
python3 images/build.py --registry HOST/PATH [IMAGE]...  build, push, and write digests.json
python3 images/build.py --rtx ...                        with TensorRT for RTX in them
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import Any, Final, NoReturn

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent
PINS: Final = HERE / "pins.json"
"""Name to reference of each image that comes from elsewhere: with tag and, once pinned, with digest."""
DIGESTS: Final = HERE / "digests.json"
"""Name to reference, by digest, of each image that was pushed."""
APT_LOCK: Final = HERE / "apt.txt"
"""SHA-256 and file name of each package of Debian that may be installed; made by `--pin`, or by `debian.py`."""
APT_ARCHIVE: Final = HERE / "apt-archive.txt"
"""Address of the dated archive of Debian that `--pin` was given, if any: images are built from the same."""
ARCHIVE_VARIABLE: Final = "APT_ARCHIVE"
"""Environment variable with that address, for `--pin`: a mirror that keeps Debian as it was on a day."""
APT_PACKAGES: Final = ("libgl1", "libglib2.0-0", "libxcb1")
PRINT_URIS: Final = (
    *("-o", "Acquire::ForceHash=SHA256"),  # unless told so, apt names the MD5 sum
    *("install", "--print-uris", "--yes", "--no-install-recommends"),
)
"""What apt-get is asked, before the packages' names, to tell what it would fetch."""
TENSORRT_LOCK: Final = HERE / "tensorrt.txt"
INDEX_VARIABLE: Final = "TENSORRT_INDEX"
"""Environment variable with the address of NVIDIA's package index, which has TensorRT's libraries."""
TENSORRT_VERSION: Final = "11.4.0.106"
TENSORRT_PACKAGES: Final = ("tensorrt-cu13", "tensorrt-cu13-bindings", "tensorrt-cu13-libs")
DOCKERFILES: Final = {
    "cpu": "Dockerfile",
    "training": "Dockerfile",
    "target": "Dockerfile",
    "mlflow": "mlflow.Dockerfile",
}
"""Image, which is also the stage of the Dockerfile, to Dockerfile."""
_BY_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}$")


def stop(message: str) -> NoReturn:
    """End with a message and the exit status of unusable input."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def docker(*arguments: str, capture: bool = False) -> str:
    """Run docker; what it prints is returned where `capture` is set, and shown otherwise."""
    done = subprocess.run(["docker", *arguments], stdout=subprocess.PIPE if capture else None, text=True)
    if done.returncode:
        print(f"failed: docker {' '.join(arguments)}", file=sys.stderr)
        raise SystemExit(1)
    return done.stdout.strip() if capture else ""


def check_docker() -> None:
    """End where there is no docker, or none that answers."""
    if shutil.which("docker") is None:
        stop("docker is not installed on this machine; images can be built wherever it is")
    answer = subprocess.run(["docker", "info", "--format", "{{.ServerErrors}}"], capture_output=True, text=True)
    if answer.returncode:
        stop(f"docker is installed, but its engine does not answer: {answer.stderr.strip()}")


def tensorrt_index() -> str:
    """Where TensorRT's libraries come from; they have a licence of their own, and are in no public lock file."""
    index = os.environ.get(INDEX_VARIABLE, "")
    if not index:
        stop(f"set {INDEX_VARIABLE} to the package index that NVIDIA's installation guide of TensorRT names for pip")
    return index


def digest_of(reference: str) -> str:
    """An image's reference by digest, as the registry knows it.

    Args:
        reference: `repository:tag` that was just pulled or pushed; a digest after it is left out.
    """
    reference = reference.partition("@")[0]
    repository = re.sub(r":[^:/]+$", "", reference)
    known = json.loads(docker("image", "inspect", "--format", "{{json .RepoDigests}}", reference, capture=True))
    for name in known:
        if name.partition("@")[0] == repository:
            return f"{reference}@{name.partition('@')[2]}"
    stop(f"docker knows no digest of {reference} in {repository}, only {known}")


def pin() -> None:
    """Write today's digests into `pins.json`, and hashes of NVIDIA's wheels into `tensorrt.txt`."""
    index = tensorrt_index()
    pins = json.loads(PINS.read_text())
    for name, reference in pins.items():
        tagged = reference.partition("@")[0]
        docker("pull", tagged)
        pins[name] = digest_of(tagged)
        print(f"{name}: {pins[name]}")
    PINS.write_text(json.dumps(pins, indent=2) + "\n")

    archive = os.environ.get(ARCHIVE_VARIABLE, "")
    asked = " ".join(["apt-get update >&2 && apt-get", *PRINT_URIS, *APT_PACKAGES])
    told = docker("run", "--rm", pins["python"], "sh", "-c", from_archive(archive) + asked, capture=True)
    APT_LOCK.write_text(apt_head(pins["python"].partition("@")[0].rpartition("-")[2]) + apt_lock(told))
    APT_ARCHIVE.unlink(missing_ok=True)
    if archive:
        APT_ARCHIVE.write_text(archive + "\n")
    print(
        f"{APT_LOCK.name}: {', '.join(APT_PACKAGES)} and what they need, from {archive or 'the mirrors of the image'}"
    )

    lock = ""
    with tempfile.TemporaryDirectory() as folder:
        # Downloaded with the Python of the image, so that they are the files that fit it.
        for package in TENSORRT_PACKAGES:
            asked = f"{package}=={TENSORRT_VERSION}"
            pip = ["pip", "download", "--no-deps", "--no-build-isolation", "--index-url", index]
            docker("run", "--rm", "-v", f"{folder}:/wheels", pins["python"], *pip, "-d", f"/wheels/{package}", asked)
            hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(folder, package).iterdir())]
            lock += " \\\n    ".join([asked, *(f"--hash=sha256:{value}" for value in hashes)]) + "\n"
    TENSORRT_LOCK.write_text(lock)
    print(f"{TENSORRT_LOCK.name}: TensorRT {TENSORRT_VERSION}")


def from_archive(archive: str) -> str:
    """The command of a shell by which apt takes a dated archive for Debian's mirrors; nothing without one.

    Args:
        archive: Its address, of which only letters that mean nothing to a shell are taken.
    """
    if not archive:
        return ""
    if not re.fullmatch(r"https?://[A-Za-z0-9.:/_~-]+", archive):
        stop(f"{ARCHIVE_VARIABLE} = {archive!r} is no address of an archive; give one that begins with https://")
    line = f"deb [check-valid-until=no] {archive} $VERSION_CODENAME main"
    return f'. /etc/os-release && rm -f /etc/apt/sources.list.d/* && echo "{line}" > /etc/apt/sources.list && '


def apt_head(suite: str) -> str:
    """The first line of the lock of Debian's packages."""
    today = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    return f"# Debian {suite}, as of {today}; make images-pin or images/debian.py writes this\n"


def apt_lock(uris: str) -> str:
    """The lock of Debian's packages.

    Args:
        uris: What `apt-get install --print-uris` says: a line `'ADDRESS' FILE SIZE SHA256:DIGEST` for each file.
    """
    rows = re.findall(r"^'[^']*' (\S+\.deb) \d+ SHA256:([0-9a-f]{64})$", uris, re.MULTILINE)
    if not rows or len(rows) != len(re.findall("^'", uris, re.MULTILINE)):
        stop("apt names packages without SHA-256: its index is not one to install from")
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(rows))


def with_debian(bill: dict[str, Any], listing: str) -> dict[str, Any]:
    """A bill of materials of Python's packages with those of Debian.

    Args:
        bill: In the form of CycloneDX.
        listing: A line for each package of Debian: name, version and architecture, separated by tabs.
    """
    rows = [line.split("\t") for line in listing.splitlines() if line]
    packages = [
        {
            "type": "library",
            "bom-ref": f"pkg:deb/debian/{name}@{version}?arch={architecture}",
            "name": name,
            "version": version,
            "purl": f"pkg:deb/debian/{name}@{version}?arch={architecture}",
        }
        for name, version, architecture in rows
    ]
    return {**bill, "components": [*bill.get("components", []), *packages]}


def build(
    image: str, base: str, build_base: str | None, registry: str | None, *, rtx: bool = False, locked: bool = True
) -> str:
    """Build one image and copy its bill of materials out of it.

    Args:
        image: Its name in `DOCKERFILES`.
        base: Reference of the image that it is built on.
        build_base: Reference of the image that what goes into it is installed in; `base` unless given.
        registry: Registry and path before its name; None for this machine only.
        rtx: Whether TensorRT for RTX is in it.
        locked: Whether packages of Debian have to be those of the lock, which is of the pinned base's release.

    Returns:
        Its reference, by tag.
    """
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    revision = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    reference = f"{registry or 'yolov8-nas'}/{image}:{version}"
    arguments = {"BASE": base, "VERSION": version, "REVISION": revision}
    if not locked:
        arguments["APT_LOCKED"] = "no"
    if build_base:
        arguments["BUILD_BASE"] = build_base
    if rtx and image != "mlflow":
        arguments["RTX"] = "1"
    if APT_ARCHIVE.is_file():
        arguments[ARCHIVE_VARIABLE] = APT_ARCHIVE.read_text().strip()
        from_archive(arguments[ARCHIVE_VARIABLE])
    if image == "target":
        arguments[INDEX_VARIABLE] = tensorrt_index()
    options = [part for name, value in arguments.items() for part in ("--build-arg", f"{name}={value}")]
    docker(
        "build", "--file", str(HERE / DOCKERFILES[image]), "--target", image, "--tag", reference, *options, str(ROOT)
    )

    bill = ROOT / "build" / "images" / f"{image}.cdx.json"
    bill.parent.mkdir(parents=True, exist_ok=True)
    container = docker("create", reference, capture=True)
    listing = bill.with_suffix(".tsv")
    docker("cp", f"{container}:/sbom.cdx.json", str(bill))
    docker("cp", f"{container}:/debian.tsv", str(listing))
    docker("rm", container, capture=True)
    if bill.is_file() and listing.is_file():
        bill.write_text(json.dumps(with_debian(json.loads(bill.read_text()), listing.read_text()), indent=2) + "\n")
    print(f"{reference}\n  bill of materials  {bill.relative_to(ROOT)}")
    return reference


def main() -> None:
    """Parse the command line and do what it says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", metavar="IMAGE", help=f"of {', '.join(DOCKERFILES)}; all by default")
    parser.add_argument("--pin", action="store_true", help="look up digests and hashes instead of building")
    parser.add_argument("--registry", help="push to this registry and path, and write the digests down")
    parser.add_argument("--base", help="build on this image instead of the pinned one; not for images that are pushed")
    parser.add_argument(
        "--build-base",
        help="install on this image instead: the same base with your certificates and settings of pip, which stay out",
    )
    parser.add_argument("--rtx", action="store_true", help="with TensorRT for RTX in them (96 MB, NVIDIA's licence)")
    asked = parser.parse_args()
    if unknown := set(asked.images) - set(DOCKERFILES):
        parser.error(f"no such image: {', '.join(sorted(unknown))}; there are {', '.join(DOCKERFILES)}")
    if asked.base and asked.registry:
        parser.error("what is pushed is built on the pinned image: leave --base out")
    check_docker()
    if asked.pin:
        pin()
        return

    images = asked.images or list(DOCKERFILES)
    base = asked.base or json.loads(PINS.read_text())["python"]
    if not asked.base and not _BY_DIGEST.search(base):
        stop(f"{PINS.relative_to(ROOT)}: {base} has no digest yet; make images-pin looks it up")
    if "target" in images and not TENSORRT_LOCK.exists():
        stop(f"{TENSORRT_LOCK.relative_to(ROOT)} is missing, which target is built from; make images-pin writes it")
    if asked.registry and not APT_LOCK.exists():
        print(
            f"warning: packages of Debian are not pinned by digest: make images-pin writes {APT_LOCK.name}",
            file=sys.stderr,
        )
    digests = json.loads(DIGESTS.read_text()) if DIGESTS.exists() else {}
    for image in images:
        reference = build(image, base, asked.build_base, asked.registry, rtx=asked.rtx, locked=not asked.base)
        if asked.registry:
            docker("push", reference)
            digests[image] = digest_of(reference)
            DIGESTS.write_text(json.dumps(digests, indent=2, sort_keys=True) + "\n")
            print(f"  pushed  {digests[image]}")
    if not asked.registry:
        print("These images are on this machine only: give a registry to get digests (make images REGISTRY=...).")


if __name__ == "__main__":
    main()
