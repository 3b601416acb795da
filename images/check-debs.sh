#!/bin/sh
# Holds each package of Debian in a folder against a lock: check-debs.sh FOLDER LOCK
# The lock names all that may be installed; what the base has already is not downloaded, and need not be there.
set -eu
for deb in "$1"/*.deb; do
  [ -e "$deb" ] || continue
  digest=$(sha256sum < "$deb")
  if ! grep -q "^${digest%% *}  " "$2"; then
    echo "$deb has SHA-256 ${digest%% *}, which is not in the lock: Debian has a newer one, or somebody changed it." >&2
    echo "Pin anew (make images-pin, or images/debian.py), or name a dated archive in APT_ARCHIVE." >&2
    exit 1
  fi
done
