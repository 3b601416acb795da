"""OpenStack Swift with its S3 interface, all four servers in one process: `python swift_server.py FOLDER`.

It writes its address to `FOLDER/address` once it answers. It lacks PUT with If-Match, bucket policies, lifecycles and
tags.
"""

from __future__ import annotations

import sys
from pathlib import Path

import eventlet

eventlet.monkey_patch()

from eventlet import wsgi  # noqa: E402 - after the patches
from swift.common import constraints, storage_policy, utils  # noqa: E402
from swift.common.ring import RingBuilder  # noqa: E402
from swift.common.wsgi import SwiftHttpProtocol, loadapp  # noqa: E402

GENERAL = """
[DEFAULT]
swift_dir = {folder}
devices = {folder}/disk
mount_check = false
log_address = /dev/null
fallocate_reserve = 0
disable_fallocate = true
"""
STORAGE = """
[pipeline:main]
pipeline = {kind}-server
[app:{kind}-server]
use = egg:swift#{kind}
"""
FILTERS = ("catch_errors", "gatekeeper", "healthcheck", "listing_formats", "bulk", "copy", "slo", "dlo")
PROXY = """
[pipeline:main]
pipeline = catch_errors gatekeeper healthcheck listing_formats bulk s3api tempauth copy slo dlo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
s3_acl = false
check_bucket_owner = false
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin .reseller_admin
""" + "".join(f"[filter:{name}]\nuse = egg:swift#{name}\n" for name in FILTERS)
CLUSTER = """
[swift-hash]
swift_hash_path_suffix = test
swift_hash_path_prefix = test
[storage-policy:0]
name = gold
default = yes
[swift-constraints]
max_header_size = 16384
"""


def ring(file: Path, port: int) -> None:
    """A ring of one disk."""
    builder = RingBuilder(4, 1, 0)
    place = {"ip": "127.0.0.1", "port": port, "replication_ip": "127.0.0.1", "replication_port": port}
    builder.add_dev({"id": 0, "region": 1, "zone": 1, "device": "d1", "weight": 1.0, "meta": "", **place})
    builder.rebalance()
    builder.get_ring().save(str(file))


def main(folder: Path) -> None:
    """Serve until killed."""
    (folder / "disk" / "d1").mkdir(parents=True)
    (folder / "swift.conf").write_text(CLUSTER)
    utils.set_swift_dir(str(folder))
    storage_policy.reload_storage_policies()
    constraints.reload_constraints()
    sockets = {kind: eventlet.listen(("127.0.0.1", 0)) for kind in ("account", "container", "object", "proxy")}
    for kind in ("account", "container", "object"):
        ring(folder / f"{kind}.ring.gz", sockets[kind].getsockname()[1])
    for kind, socket in sockets.items():
        file = folder / f"{kind}.conf"
        text = PROXY if kind == "proxy" else STORAGE.format(kind=kind)
        file.write_text(f"{GENERAL.format(folder=folder)}bind_port = {socket.getsockname()[1]}\n{text}")
        eventlet.spawn(
            wsgi.server,
            socket,
            loadapp(str(file), global_conf={"log_name": kind}),
            log_output=False,
            protocol=SwiftHttpProtocol,
            capitalize_response_headers=False,
        )
    address = folder / "address"
    address.with_suffix(".new").write_text("http://127.0.0.1:{}".format(sockets["proxy"].getsockname()[1]))
    address.with_suffix(".new").replace(address)
    while True:
        eventlet.sleep(3600)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
