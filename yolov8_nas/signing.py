"""Signatures on evidence: who has made it, told by a key that those who may write to a bucket or to MLflow don't have.

A hash says that bytes are those that were meant where the hash itself is known to be right; whoever may write both can
change both. So what vouches for others' bytes (the manifest of a result, the tags of a registered version, the records
of a run) carries a signature where a key is configured, and what carries none that a trusted key has made is refused.

    YOLOV8_NAS_SIGNING_KEY      file with the private key; for those who run stages and register
    YOLOV8_NAS_TRUSTED_KEYS     file or folder with public keys (`*.pub`); for everybody who reads

The key is one of Ed25519 (RFC 8032) in PEM. A secret of HMAC-SHA256 can stand in its place, in a file that says
`hmac-sha256:` and 64 hexadecimal digits; then whoever can check a signature can make one, too. Several keys can be
trusted at once, which is how one takes the place of another.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from yolov8_nas.errors import InputError

KEY_VARIABLE: Final = "YOLOV8_NAS_SIGNING_KEY"
"""Environment variable with the file of the private key."""

TRUSTED_VARIABLE: Final = "YOLOV8_NAS_TRUSTED_KEYS"
"""Environment variable with a file or a folder of public keys."""

PRIVATE_FILE: Final = "signing.key"
PUBLIC_SUFFIX: Final = ".pub"

_HMAC: Final = "hmac-sha256:"
_LONGEST_KEY: Final = 10_000  # bytes of a file that should hold a key

Signature = dict[str, str]
"""A signature as it stands in JSON: `key`, the id of the key, and `signature` in Base64."""


class _Key(Protocol):
    """A key that can check, and perhaps sign."""

    @property
    def id(self) -> str: ...

    def sign(self, message: bytes) -> bytes: ...

    def fits(self, message: bytes, signature: bytes) -> bool: ...


@dataclass(frozen=True)
class _Ed25519:
    public: Any
    private: Any = None

    @property
    def id(self) -> str:
        return hashlib.sha256(b"ed25519 " + self.public.public_bytes_raw()).hexdigest()[:16]

    def sign(self, message: bytes) -> bytes:
        signature: bytes = self.private.sign(message)
        return signature

    def fits(self, message: bytes, signature: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            self.public.verify(signature, message)
        except InvalidSignature:
            return False
        return True


@dataclass(frozen=True)
class _Hmac:
    secret: bytes

    @property
    def id(self) -> str:
        return hashlib.sha256(b"hmac-sha256 " + self.secret).hexdigest()[:16]

    def sign(self, message: bytes) -> bytes:
        return hmac.digest(self.secret, message, "sha256")

    def fits(self, message: bytes, signature: bytes) -> bool:
        return hmac.compare_digest(self.sign(message), signature)


@dataclass(frozen=True)
class Keys:
    """The keys that a process has.

    Attributes:
        signing: What it signs with, if it may.
        trusted: Keys whose signatures count, by id; that of `signing` is among them.
    """

    signing: _Key | None
    trusted: Mapping[str, _Key]

    def __bool__(self) -> bool:
        """Whether signatures are asked for."""
        return bool(self.trusted)

    def sign(self, kind: str, statement: Any) -> Signature | None:
        """Sign a statement; nothing without a key to sign with.

        Args:
            kind: What it is about, so that a signature on one kind says nothing of another.
            statement: Plain data.
        """
        if self.signing is None:
            return None
        signature = self.signing.sign(_message(kind, statement))
        return {"key": self.signing.id, "signature": base64.b64encode(signature).decode()}

    def fault(self, kind: str, statement: Any, signature: Any) -> str | None:
        """Why a statement is not to be trusted; nothing where it is, or where no key is configured.

        Args:
            kind: As for `sign`.
            statement: Plain data, as it was read.
            signature: What it carries; anything, since it was read, too.
        """
        if not self:
            return None
        if signature is None:
            return f"it is not signed, and {TRUSTED_VARIABLE} asks for a signature"
        if not isinstance(signature, Mapping) or not {"key", "signature"} <= set(signature):
            return "its signature is none"
        named = signature["key"]
        key = self.trusted.get(named) if isinstance(named, str) else None
        if key is None:
            return f"it is signed with the key {str(named)[:16]!a}, which is none of {', '.join(self.trusted)}"
        try:
            raw = base64.b64decode(signature["signature"], validate=True)
            fits = key.fits(_message(kind, statement), raw)
        except (TypeError, ValueError, binascii.Error):
            fits = False
        return None if fits else f"it is not what was signed with the key {key.id}: it was altered, or is another's"


def keys() -> Keys:
    """The keys that the environment names.

    Raises:
        InputError: A file is missing or holds no key.
    """
    private, public = os.environ.get(KEY_VARIABLE), os.environ.get(TRUSTED_VARIABLE)
    signing = _private(Path(private).expanduser(), KEY_VARIABLE) if private else None
    trusted = {key.id: key for key in (_public_keys(Path(public).expanduser()) if public else [])}
    if signing is not None:
        trusted[signing.id] = signing
    return Keys(signing, trusted)


def environment(key: str | None, trusted: str | None) -> dict[str, str]:
    """What a run configuration says of keys, as environment variables for the processes of its run.

    What the environment says stays: whoever writes a configuration cannot make a machine trust others than it does.

    Args:
        key: File of the private key.
        trusted: File or folder of public keys.
    """
    if KEY_VARIABLE in os.environ or TRUSTED_VARIABLE in os.environ:
        return {}
    return {variable: path for variable, path in ((KEY_VARIABLE, key), (TRUSTED_VARIABLE, trusted)) if path}


def adopt(key: str | None, trusted: str | None) -> None:
    """As `environment`, for this process and those that it starts."""
    os.environ.update(environment(key, trusted))


def require_signer() -> None:
    """See that what this process makes can be signed, where signatures are asked for.

    Raises:
        InputError: They are asked for, and there is no key to sign with.
    """
    found = keys()
    if found and found.signing is None:
        raise InputError(
            f"{TRUSTED_VARIABLE} asks for signatures, and there is no key to sign with, so that nobody would take what "
            f"is made here: set {KEY_VARIABLE} to the file of the private key"
        )


def make_keys(folder: Path, *, shared_secret: bool = False) -> list[Path]:
    """Make a new key: `signing.key`, which only its owner may read, and `<id>.pub`, for everybody who reads evidence.

    Args:
        folder: Where they go; it is made.
        shared_secret: Make a secret of HMAC-SHA256 instead, which is both.

    Returns:
        The files.

    Raises:
        InputError: There is a private key already.
    """
    private = folder / PRIVATE_FILE
    if private.exists():
        raise InputError(
            f"{private}: is there already; give another folder, and trust both keys until all is signed anew"
        )
    folder.mkdir(parents=True, exist_ok=True)
    key: _Key
    if shared_secret:
        key = _Hmac(secrets.token_bytes(32))
        public = content = f"{_HMAC}{key.secret.hex()}\n".encode()
    else:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        made = Ed25519PrivateKey.generate()
        key = _Ed25519(made.public_key(), made)
        content = made.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        public = made.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    shown = folder / f"{key.id}{PUBLIC_SUFFIX}"
    for file, data, mode in ((private, content, 0o600), (shown, public, 0o600 if shared_secret else 0o644)):
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as opened:
            opened.write(data)
    return [private, shown]


def _message(kind: str, statement: Any) -> bytes:
    """What is signed: the kind, and the statement in the one form that it has when it comes back from JSON."""
    plain = json.loads(json.dumps(statement, allow_nan=False))
    return f"yolov8-nas {kind} 1\n{json.dumps(plain, sort_keys=True)}".encode()


def _private(file: Path, named_by: str) -> _Key:
    content = _read(file, named_by)
    if secret := _secret(content, file):
        return secret
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    try:
        found = serialization.load_pem_private_key(content, password=None)
    except Exception as error:  # of several classes: damaged, encrypted, of an unknown kind
        raise _no_key(file, named_by, str(error)) from None
    if not isinstance(found, Ed25519PrivateKey):
        raise _no_key(file, named_by, f"a {type(found).__name__}")
    return _Ed25519(found.public_key(), found)


def _public_keys(place: Path) -> list[_Key]:
    files = sorted(place.glob(f"*{PUBLIC_SUFFIX}")) if place.is_dir() else [place]
    if not files:
        raise InputError(f"{TRUSTED_VARIABLE}: {place} has no public key (*{PUBLIC_SUFFIX}); put one there")
    return [_public(file) for file in files]


def _public(file: Path) -> _Key:
    content = _read(file, TRUSTED_VARIABLE)
    if secret := _secret(content, file):
        return secret
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        found = serialization.load_pem_public_key(content)
    except Exception as error:  # of several classes
        raise _no_key(file, TRUSTED_VARIABLE, str(error)) from None
    if not isinstance(found, Ed25519PublicKey):
        raise _no_key(file, TRUSTED_VARIABLE, f"a {type(found).__name__}")
    return _Ed25519(found)


def _secret(content: bytes, file: Path) -> _Hmac | None:
    """The shared secret in a file, if it says that it holds one."""
    text = content.decode(errors="replace").strip()
    if not text.startswith(_HMAC):
        return None
    try:
        secret = bytes.fromhex(text.removeprefix(_HMAC))
    except ValueError:
        secret = b""
    if len(secret) != 32:
        raise InputError(f"{file}: after {_HMAC} stand 64 hexadecimal digits; make one with yolov8-nas models make-key")
    return _Hmac(secret)


def _read(file: Path, named_by: str) -> bytes:
    try:
        with file.open("rb") as opened:
            return opened.read(_LONGEST_KEY)
    except OSError as error:
        raise InputError(f"{named_by}: {file} cannot be read ({error.strerror}); give the file of a key") from None


def _no_key(file: Path, named_by: str, why: str) -> InputError:
    said = " ".join(why.split())[:120]
    return InputError(
        f"{named_by}: {file} holds no key of Ed25519 in PEM without a password ({said}); make one with yolov8-nas "
        "models make-key"
    )
