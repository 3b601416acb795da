#!/usr/bin/env bash
# Makes two docker images that stand in for python:3.11-slim where no registry can be reached: $1:base, Debian 12 from
# its packages, and $1:build, the same with this machine's certificates and settings of pip. For tests only.
# Needs root, docker and debootstrap.
set -euo pipefail
name=${1:?usage: stand_in_base.sh NAME}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$folder/root" >&2
tar -C "$folder/root" -c . | docker import - "$name:base"

mkdir "$folder/settings"
cp /etc/ssl/certs/ca-certificates.crt "$folder/settings"
cat /etc/pip.conf > "$folder/settings/pip.conf" 2> /dev/null || true
cat > "$folder/settings/Dockerfile" << END
FROM $name:base
COPY ca-certificates.crt /etc/ssl/certs/
COPY pip.conf /etc/
ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt PIP_DEFAULT_TIMEOUT=180
END
docker build --tag "$name:build" "$folder/settings"
