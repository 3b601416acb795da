"""The host's lock: computing is shared, measuring is alone, and the two nest."""

from __future__ import annotations

import tempfile
import threading
from pathlib import Path

import pytest

from yolov8_nas.device.host import FOLDER_VARIABLE, LOCK_VARIABLE, NODE_VARIABLE, HostLock, default_path
from yolov8_nas.errors import InputError


def _free(path: Path) -> bool:
    """Whether somebody else could measure now."""
    try:
        with HostLock(path).measuring(wait=False):
            return True
    except BlockingIOError:
        return False


def test_many_compute_and_one_measures(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    first, second = HostLock(path), HostLock(path)
    with first.computing(), second.computing():
        assert not _free(path)
    with first.measuring():
        assert not _free(path)
    assert _free(path)


def test_the_one_who_waits_says_so(tmp_path: Path) -> None:
    notes: list[str] = []
    told, order = threading.Event(), []

    def note(text: str) -> None:
        notes.append(text)
        told.set()

    def other() -> None:
        with HostLock(tmp_path / "lock", note).measuring():
            order.append("measured")

    with HostLock(tmp_path / "lock").computing():
        thread = threading.Thread(target=other)
        thread.start()
        assert told.wait(5)
        order.append("computed")
    thread.join(5)
    assert order == ["computed", "measured"]
    assert "waiting for other work" in notes[0]


def test_measuring_inside_computing_gives_way_and_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    host, both = HostLock(path), threading.Barrier(2)

    def other() -> None:
        lock = HostLock(path, lambda _: None)
        with lock.computing():
            both.wait(5)
            with lock.measuring():  # two that compute and both come to measure must not wait for each other
                pass

    thread = threading.Thread(target=other)
    thread.start()
    with host.computing():
        both.wait(5)
        with host.measuring():
            assert not _free(path)
            with host.computing(), pytest.raises(BlockingIOError), HostLock(path).measuring(wait=False):
                pass
        assert not _free(path)
    thread.join(5)
    assert not thread.is_alive()
    assert _free(path)


def test_an_attempt_that_fails_keeps_the_old_lock(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    host, other = HostLock(path), HostLock(path)
    with host.computing():
        with other.computing(), pytest.raises(BlockingIOError), host.measuring(wait=False):
            pass
        assert not _free(path)


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "lock").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"lock.*remove it"), HostLock(tmp_path / "lock").computing():
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_containers_of_one_host_share_a_lock_in_a_folder_and_those_of_another_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(LOCK_VARIABLE, raising=False)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "volume" / "hosts"))
    monkeypatch.setenv(NODE_VARIABLE, "node-1.example.com")
    first = HostLock()
    with first.computing():
        assert not _free(default_path())
        monkeypatch.setenv(NODE_VARIABLE, "node-2")
        assert _free(default_path())
    monkeypatch.setenv(NODE_VARIABLE, "../elsewhere")
    with pytest.raises(InputError, match=NODE_VARIABLE):
        default_path()
    monkeypatch.setenv(NODE_VARIABLE, "node")
    monkeypatch.setenv(FOLDER_VARIABLE, str(first.path / "below-a-file"))
    with pytest.raises(InputError, match="locks of hosts"):
        default_path()
    monkeypatch.delenv(NODE_VARIABLE)
    assert default_path().parent == Path(tempfile.gettempdir())
