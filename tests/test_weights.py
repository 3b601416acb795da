"""Weights by name, path and address: looked for here, downloaded once and with consent, and held against their hash."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from web_files import Files

from yolov8_nas.config import SupernetConfig
from yolov8_nas.data import weights
from yolov8_nas.errors import InputError
from yolov8_nas.run.local import with_absolute_paths
from yolov8_nas.stages.supernet_train.settings import Weights, start_weights

CONTENT = b"a checkpoint" * 100
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of weights; the current folder is an empty one."""
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv(weights.FOLDER_VARIABLE, str(tmp_path / "weights"))
    monkeypatch.delenv(weights.CONSENT_VARIABLE, raising=False)
    monkeypatch.setattr(weights, "RELEASE", "https://127.0.0.1:9/")  # nobody answers
    return tmp_path / "weights"


def local(named: str, **more: object) -> Path:
    return weights.local(SupernetConfig.model_validate({"weights": named, **more}))


def refused(named: str, **more: object) -> str:
    with pytest.raises(InputError, match=f"^supernet.weights = {named!r}: ") as told:
        local(named, **more)
    assert "\n" not in str(told.value)
    return str(told.value)


def test_a_name_is_looked_for_here_then_in_the_folder_of_weights(folder: Path, tmp_path: Path) -> None:
    folder.mkdir()
    (folder / "yolov8s.pt").write_bytes(CONTENT)
    assert local("yolov8s.pt") == folder / "yolov8s.pt"
    assert (folder / "yolov8s.pt.sha256").read_text() == f"{SHA256}  yolov8s.pt\n"
    other = tmp_path / "other"
    other.mkdir()
    (other / "yolov8s.pt").write_bytes(CONTENT)
    assert local("yolov8s.pt", weights_folder=str(other)) == other / "yolov8s.pt"
    Path("yolov8s.pt").write_bytes(CONTENT)
    assert local("yolov8s.pt") == Path("yolov8s.pt").absolute()


def test_without_consent_one_line_says_what_to_put_where(folder: Path) -> None:
    told = refused("yolov8s.pt")
    assert f"put the file there as {folder / 'yolov8s.pt'}, or let it be downloaded" in told
    assert "supernet.download: true or YOLOV8_NAS_DOWNLOAD=1" in told
    for named in ("yolov8x.pt", "yolo11n.pt", "best.pt"):  # nothing is downloaded under these names
        told = refused(named, download=True)
        assert f"put the file there as {folder / named}" in told and "download" not in told
    assert not folder.exists()


@pytest.mark.parametrize("in_configuration", [True, False])
def test_with_consent_it_is_downloaded_once(
    in_configuration: bool,
    folder: Path,
    https: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(weights, "RELEASE", f"{https}/assets/")
    monkeypatch.setitem(Files.content, "/assets/yolov8s.pt", CONTENT)
    if not in_configuration:
        monkeypatch.setenv(weights.CONSENT_VARIABLE, "1")
    file = local("yolov8s.pt", download=in_configuration)
    assert file == folder / "yolov8s.pt" and file.read_bytes() == CONTENT
    assert (folder / "yolov8s.pt.sha256").read_text().startswith(SHA256)
    monkeypatch.setattr(weights.remote, "fetch", None)  # it is there
    assert local("yolov8s.pt") == file
    told = start_weights(SupernetConfig(weights="yolov8s.pt"))
    assert told == Weights(path=str(file), sha256=SHA256)


def test_an_address_is_downloaded_once(folder: Path, https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Files.content, "/ours/best.pt", CONTENT)
    file = local(f"{https}/ours/best.pt")
    assert file.parent == folder and file.name.endswith("-best.pt") and file.read_bytes() == CONTENT
    monkeypatch.setitem(Files.content, "/ours/best.pt", b"another")
    assert local(f"{https}/ours/best.pt") == file and file.read_bytes() == CONTENT


def test_what_cannot_be_had_is_one_line(folder: Path, https: str, monkeypatch: pytest.MonkeyPatch) -> None:
    told = refused("yolov8s.pt", download=True)
    assert "no answer" in told and f"without a network, put the file there as {folder / 'yolov8s.pt'}" in told
    assert "404" in refused(f"{https}/none.pt")
    monkeypatch.setitem(Files.content, "/large.pt", CONTENT)
    monkeypatch.setattr(weights, "MOST_BYTES", 100)
    assert "1,200 bytes, more than 100" in refused(f"{https}/large.pt")
    assert "names no file" in refused(f"{https}/")
    assert not [path for path in folder.glob("*.pt") if path.is_file()]


def test_a_hash_that_changed_is_refused(folder: Path) -> None:
    folder.mkdir()
    file = folder / "yolov8n.pt"
    file.write_bytes(CONTENT)
    local("yolov8n.pt")
    file.write_bytes(b"another")
    told = refused("yolov8n.pt")
    assert SHA256 in told and hashlib.sha256(b"another").hexdigest() in told and str(file) in told
    (folder / "yolov8n.pt.sha256").unlink()
    assert local("yolov8n.pt") == file


def test_names_and_addresses_stay_what_they_are_where_paths_become_absolute(folder: Path) -> None:
    def kept(named: str) -> str:
        changed: str = with_absolute_paths({"supernet": {"weights": named}})["supernet"]["weights"]
        return changed

    for named in ("yolov8s.pt", "s3://bucket/best.pt", "https://host/best.pt", "store://supernets/" + "0" * 64):
        assert kept(named) == named
    assert kept("runs/best.pt") == str(Path("runs/best.pt").absolute())
    Path("yolov8s.pt").touch()
    assert kept("yolov8s.pt") == str(Path("yolov8s.pt").absolute())
    changed = with_absolute_paths({"supernet": {"weights_folder": "mine"}})["supernet"]
    assert changed == {"weights_folder": str(Path("mine").absolute())}
