#!/bin/sh
# Dumps a database to a folder and keeps the newest dumps: backup.sh FOLDER HOW_MANY. Where the database is, libpq's
# variables say (PGHOST, PGDATABASE, PGUSER, PGPASSWORD).
set -eu
folder=$1 keep=$2
name=$folder/$PGDATABASE-$(date -u +%Y%m%dT%H%M%SZ).dump
rm -f "$folder"/*.part
# A network policy is in force some seconds after its pod has begun, and until then nothing answers.
tries=0
until pg_isready --quiet --timeout=5; do
  tries=$((tries + 1))
  [ "$tries" -lt 60 ] || { echo "$PGHOST does not answer" >&2; exit 1; }
  sleep 2
done
pg_dump --format=custom --file="$name.part"
pg_restore --list "$name.part" > /dev/null # it can be read to its end
mv "$name.part" "$name"
ls -1 "$folder"/*.dump | sort -r | tail -n "+$((keep + 1))" | while read -r old; do rm -- "$old"; done
echo "$name: $(stat -c %s "$name") bytes; kept: $(ls -1 "$folder"/*.dump | wc -l)"
