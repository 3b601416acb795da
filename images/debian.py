"""Pin the packages of Debian that the images install, on any machine with apt and Debian's keys; no docker is needed.

python3 images/debian.py MIRROR [SECURITY]    writes images/apt.txt: SHA-256 and file name of each package
python3 images/debian.py ARCHIVE              the same from a mirror of Debian as it was on a day, which images are then
                                              built from: apt-archive.txt names it

MIRROR and SECURITY are what apt's sources name: http://HOST/debian and http://HOST/debian-security. apt holds their
indexes against Debian's signature. Nothing of this machine's own packages or sources has a part in it: all that is
needed is listed, down to the C library, so that whatever a base has already is in the lock, too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent))

import build

KEYS: Final = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
SUITE: Final = "trixie"
"""The release of Debian of the base in pins.json."""

_DATED: Final = re.compile(r"/[0-9]{8}T[0-9]{6}Z(/|$)")


def sources(suite: str, mirror: str, security: str | None, *, dated: bool) -> str:
    """The lines of apt's sources for a release, from mirrors or from a dated archive."""
    options = f"signed-by={KEYS}" + (" check-valid-until=no" if dated else "")
    lines = [f"deb [{options}] {mirror} {suite} main"]
    if not dated:
        lines.append(f"deb [{options}] {mirror} {suite}-updates main")
    if security:
        lines.append(f"deb [{options}] {security} {suite}-security main")
    return "\n".join(lines) + "\n"


def resolved(lines: str) -> str:
    """What apt would fetch for our packages on a machine that has none, as `--print-uris` writes it."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for part in ("etc/apt/apt.conf.d", "etc/apt/preferences.d", "etc/apt/sources.list.d", "var/lib/dpkg"):
            (root / part).mkdir(parents=True)
        for part in ("var/lib/apt/lists/partial", "var/cache/apt/archives/partial"):
            (root / part).mkdir(parents=True)
        (root / "etc/apt/sources.list").write_text(lines)
        status = root / "var/lib/dpkg/status"
        status.write_text("")
        named = {
            "Dir": root,
            "Dir::State::status": status,
            "APT::Architecture": "amd64",
            "APT::Architectures": "amd64",
            "Acquire::Languages": "none",
            "APT::Sandbox::User": "root",
        }
        options = [part for name, value in named.items() for part in ("-o", f"{name}={value}")]
        _apt(*options, "update")
        return _apt(*options, *build.PRINT_URIS, *build.APT_PACKAGES)


def _apt(*arguments: str) -> str:
    done = subprocess.run(["apt-get", "--quiet", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        build.stop(f"apt-get {arguments[-1]}: {' '.join(done.stderr.split())[:500]}")
    return done.stdout


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse the command line and write the locks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("mirror", help="address of Debian's archive, or of one as it was on a day")
    parser.add_argument("security", nargs="?", help="address of the archive of security updates")
    parser.add_argument("--suite", default=SUITE, help=f"release of Debian of the base, {SUITE} by default")
    asked = parser.parse_args(arguments)
    for address in filter(None, (asked.mirror, asked.security)):
        build.from_archive(address)  # refuses what is no address
    if not KEYS.is_file():
        build.stop(f"{KEYS} is missing, by which Debian's index is checked: install debian-archive-keyring")
    dated = bool(_DATED.search(asked.mirror))
    lock = build.apt_lock(resolved(sources(asked.suite, asked.mirror, asked.security, dated=dated)))
    build.APT_LOCK.write_text(build.apt_head(asked.suite) + lock)
    build.APT_ARCHIVE.unlink(missing_ok=True)
    if dated:
        build.APT_ARCHIVE.write_text(asked.mirror + "\n")
    print(f"{build.APT_LOCK.name}: {lock.count(chr(10))} packages of Debian {asked.suite}")


if __name__ == "__main__":
    main()
