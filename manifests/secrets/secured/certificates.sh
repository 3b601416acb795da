#!/bin/sh
# Makes a CA, and certificates of MLflow and its database, in the folder of this script. The CA's key signs and then goes:
# for new certificates (they hold for two years) run it again and apply all of them.
set -eu
umask 077
cd "$(dirname "$0")"
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
ec="-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
openssl req -x509 $ec -days 730 -subj "/CN=yolov8-nas" -keyout "$work/ca.key" -out ca.crt \
  -addext "basicConstraints=critical,CA:TRUE,pathlen:0" -addext "keyUsage=critical,keyCertSign,cRLSign" 2> /dev/null
for name in mlflow postgres; do
  openssl req $ec -subj "/CN=$name" -keyout "$name.key" -out "$work/$name.csr" 2> /dev/null
  {
    echo "subjectAltName=DNS:$name,DNS:$name.yolov8-nas,DNS:$name.yolov8-nas.svc,DNS:$name.yolov8-nas.svc.cluster.local,DNS:localhost"
    echo "basicConstraints=critical,CA:FALSE"
    echo "extendedKeyUsage=serverAuth"
  } > "$work/extensions"
  openssl x509 -req -in "$work/$name.csr" -CA ca.crt -CAkey "$work/ca.key" -CAserial "$work/ca.srl" -CAcreateserial -days 730 \
    -extfile "$work/extensions" -out "$name.crt" 2> /dev/null
done
echo "made in $PWD: ca.crt, mlflow.crt, mlflow.key, postgres.crt, postgres.key"
