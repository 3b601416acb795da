"""Where a registry keeps files, as it says itself, and whether this machine goes there.

MLflow's client follows each address that an experiment names, and sends the credentials for the tracking server along
(3.17.2, `HttpArtifactRepository`). Whoever may make an experiment may name any address. So what is reached over HTTP
has to be the tracking server itself; object stores are asked with credentials of their own, which do not travel.
"""

from __future__ import annotations

from typing import Final
from urllib.parse import urlsplit

from yolov8_nas.errors import InputError
from yolov8_nas.names import shown

_OBJECT_STORES: Final = ("s3", "r2", "b2", "gs", "wasbs", "abfs", "abfss", "hdfs", "viewfs", "dbfs")
_PORTS: Final = {"http": 80, "https": 443}


def check(location: str, what: str) -> None:
    """See that files may be fetched from a place, or brought to it.

    Args:
        location: The address, as the registry names it.
        what: Whose files lie there, for the message.

    Raises:
        InputError: It is a server other than the one that MLflow's client is connected to, or of a kind that is not
            gone to.
    """
    import mlflow

    try:
        place, server = urlsplit(location), urlsplit(mlflow.get_tracking_uri())
        kind = place.scheme.lower()
        if kind in _OBJECT_STORES or (kind == "file" and not place.hostname):
            return
        if not kind and "://" not in location:  # a path
            return
        if kind == "mlflow-artifacts":
            kind = server.scheme
            if not place.netloc:  # the server that the client is connected to
                return
        default = _PORTS.get(kind)
        if default and (kind, place.hostname, place.port or default) == (
            server.scheme,
            server.hostname,
            server.port or default,
        ):
            return
    except ValueError:  # a port that is no number
        pass
    raise InputError(
        f"{what}: its files are said to lie at {shown(location)}, which is neither the tracking server nor an object "
        "store; nobody is asked there: have the experiment's artifact location corrected"
    )
