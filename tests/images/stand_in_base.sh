#!/usr/bin/env bash
# Makes the docker image $1 that stands in for python:3.11-slim where no registry can be reached: Debian 12 from its
# packages, with this machine's certificates and settings of pip. For tests only.
# Needs root, docker and debootstrap.
set -euo pipefail
name=${1:?usage: stand_in_base.sh NAME}
root=$(mktemp -d)
trap 'rm -rf "$root"' EXIT
debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" >&2
cp /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/ca-certificates.crt"
if [ -f /etc/pip.conf ]; then cp /etc/pip.conf "$root/etc/pip.conf"; fi
tar -C "$root" -c . | docker import - "$name"
