"""Sign and check who somebody is and what they may do.

In:     a key, claims or a token, and the time as an argument (seconds since 1970)
Out:    tokens; `Grant` and `Resume` values, or an exception
Owns:   the claims. Grant: `sub` (text, the user; absent = nobody), `exp` (number, required), `iat`
        (number), `channels` and `publish` (lists of patterns), `info` (any JSON)
Never:  reads a clock; fetches a key; lets the token choose the algorithm. A resume token is signed with
        a key of its own, so neither passes for the other

Source: RFC 7519 (JWT), RFC 8725 (its best current practices).
"""

import base64
import functools
import hashlib
import hmac
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jwt
import orjson
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from pubsub_mw.errors import ChannelError, GrantError, GrantExpired, SettingsError
from pubsub_mw.model import ConnectionId, Grant, Position, channel_of_user

__all__ = ["GrantVerifier", "Resume", "queue_key", "sign_grant", "sign_resume", "verify_resume"]

_UNTIMED = {"verify_exp": False, "verify_nbf": False, "verify_iat": False, "verify_aud": False, "verify_sub": False}

_P256 = ec.SECP256R1()

_RESUME_HEADER = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9"
"""`{"alg":"HS256","typ":"JWT"}`. Resume tokens are JWTs signed and checked here: one is made for every connection, and
what PyJWT does beyond an HMAC takes three times as long."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """What a resume token restores.

    Attributes:
        connection: the id
        grant: what the connection was allowed when the token was made, or None; its own expiry holds
        user_position: where the user's channel stood then, or None
        issued_at: seconds since 1970
        channels: channel -> position as text or None: what a stream or a poll listens to that names none
    """

    connection: ConnectionId
    grant: Grant | None
    user_position: Position | None
    issued_at: float
    channels: Mapping[str, str | None] = field(default_factory=dict)


def sign_grant(
    secret: str,
    *,
    now: float,
    expires: float,
    user: str | None = None,
    channels: tuple[str, ...] = (),
    publish: tuple[str, ...] = (),
    info: object = None,
) -> str:
    """Sign a grant that is good for `expires` seconds from `now`.

    Raises:
        ChannelError: `user` cannot be part of a channel name.
    """
    claims: dict[str, Any] = {"iat": now, "exp": now + expires, "channels": list(channels), "publish": list(publish)}
    if user is not None:
        channel_of_user(user)
        claims["sub"] = user
    if info is not None:
        claims["info"] = info
    return jwt.encode(claims, secret, algorithm="HS256")


class GrantVerifier:
    """Check grants against one fixed key.

    Args:
        secret: verifies HS256
        public_key: PEM text; verifies RS256, ES256 or EdDSA, by the kind of key, instead of `secret`

    Raises:
        SettingsError: `public_key` is not a usable public key.
    """

    def __init__(self, secret: str, public_key: str | None = None) -> None:
        self._key: Any = secret
        self._algorithms = ["HS256"]
        if public_key is not None:
            self._key, self._algorithms = _load_public_key(public_key)

    def verify(self, token: str, *, now: float) -> Grant:
        """Return what `token` allows.

        Raises:
            GrantExpired: it was valid until before `now`.
            GrantError: it never was.
        """
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=self._algorithms,
                options={**_UNTIMED, "require": ["exp"]},  # type: ignore[arg-type]
            )
        except (jwt.InvalidTokenError, UnicodeEncodeError) as error:
            raise GrantError(f"the grant is not valid: {error}") from error
        grant = _grant_from(claims)
        not_before = claims.get("nbf", now)
        if not _is_time(not_before) or not_before > now:
            raise GrantError("the grant is not valid yet (nbf)")
        if grant.expires_at <= now:
            raise GrantExpired(
                f"the grant expired {now - grant.expires_at:.0f} s ago; ask the application for a new one"
            )
        return grant

    def admit(self, token: str | None, resume: Resume | None, *, now: float) -> tuple[Grant | None, Resume | None]:
        """Return as who somebody connects that shows a grant, or what it was before, or both, or nothing.

        Somebody else now is a new connection: the id, and what was sent to it, stay with whom they belong to.

        Raises:
            GrantExpired, GrantError: the grant that counts is not good.
        """
        grant = resume.grant if resume is not None else None
        if token is not None:
            grant = self.verify(token, now=now)
        elif grant is not None and grant.expires_at <= now:
            raise GrantExpired("the grant of the resumed connection expired; show a new one in connect")
        if resume is not None and resume.grant is not None and resume.grant.user not in (None, grant and grant.user):
            resume = None
        return grant, resume


def sign_resume(secret: str, resume: Resume, *, expires: float, use: str = "resume") -> str:
    """Sign a resume token that is good for `expires` seconds from its `issued_at`.

    Args:
        use: one made for another use is not a resume token: whoever reads it on its way cannot show it
    """
    claims: dict[str, Any] = {"cid": resume.connection, "iat": resume.issued_at, "exp": resume.issued_at + expires}
    if resume.user_position is not None:
        claims["at"] = str(resume.user_position)
    if resume.channels:
        claims["channels"] = dict(resume.channels)
    if resume.grant is not None:
        grant = resume.grant
        claims["grant"] = {
            "sub": grant.user,
            "channels": grant.channels,
            "publish": grant.publish,
            "info": grant.info,
            "iat": grant.issued_at,
            "exp": grant.expires_at,
        }
    try:
        payload = orjson.dumps(claims)
    except TypeError:  # a number in `info` of more than 64 bits
        payload = json.dumps(claims).encode()
    content = f"{_RESUME_HEADER}.{_encode(payload)}"
    return f"{content}.{_sign(content, secret, use)}"


def verify_resume(secret: str, token: str, *, now: float, use: str = "resume") -> Resume:
    """Return what `token` restores. The grant inside may have expired: the caller looks.

    Raises:
        GrantExpired: the token itself is too old.
        GrantError: it is not one of ours.
    """
    content, _, signature = token.rpartition(".")
    header, _, payload = content.partition(".")
    # The header is compared, never read: what is signed here has one algorithm and one form.
    is_ours = hmac.compare_digest(signature.encode("utf-8", "replace"), _sign(content, secret, use).encode())
    if header != _RESUME_HEADER or not is_ours:
        raise GrantError("the resume token is not valid: it was not signed here, or altered since")
    claims = json.loads(base64.urlsafe_b64decode(payload + "=="))
    if claims["exp"] <= now:
        raise GrantExpired("the resume token is too old")
    return Resume(
        connection=ConnectionId(claims["cid"]),
        grant=_grant_from(claims["grant"]) if "grant" in claims else None,
        user_position=Position.parse(claims["at"]) if "at" in claims else None,
        issued_at=claims["iat"],
        channels=claims.get("channels", {}),
    )


def queue_key(secret: str) -> bytes:
    """Return the key that signs what waits in the request queue: write access to the broker is not enough."""
    return hmac.new(secret.encode(), b"pubsub-mw request", hashlib.sha256).digest()


def _sign(content: str, secret: str, use: str) -> str:
    return _encode(hmac.digest(_resume_key(secret, use), content.encode("utf-8", "replace"), "sha256"))


@functools.lru_cache(16)
def _resume_key(secret: str, use: str) -> bytes:
    return hmac.new(secret.encode(), f"pubsub-mw {use} token".encode(), hashlib.sha256).hexdigest().encode()


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _grant_from(claims: Mapping[str, Any]) -> Grant:
    user = claims.get("sub")
    issued_at = claims.get("iat", 0.0)
    if user is not None:
        if not isinstance(user, str):
            raise GrantError("the grant's sub must be a text")
        try:
            channel_of_user(user)
        except ChannelError as error:
            raise GrantError("the grant's sub holds a character that a channel name cannot") from error
    if not _is_time(claims["exp"]) or not _is_time(issued_at):
        raise GrantError("the grant's exp and iat must be numbers")
    return Grant(
        user=user,
        channels=_patterns(claims, "channels"),
        publish=_patterns(claims, "publish"),
        info=claims.get("info"),
        issued_at=float(issued_at),
        expires_at=float(claims["exp"]),
    )


def _patterns(claims: Mapping[str, Any], name: str) -> tuple[str, ...]:
    patterns = claims.get(name, ())
    if not isinstance(patterns, (list, tuple)) or not all(isinstance(pattern, str) for pattern in patterns):
        raise GrantError(f"the grant's {name} must be a list of patterns")
    return tuple(patterns)


def _is_time(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e15


def _load_public_key(text: str) -> tuple[Any, list[str]]:
    try:
        key = load_pem_public_key(text.encode())
    except ValueError as error:
        raise SettingsError("grant_public_key is not the PEM text of a public key") from error
    for kind, algorithm in (
        (rsa.RSAPublicKey, "RS256"),
        (ec.EllipticCurvePublicKey, "ES256"),
        (ed25519.Ed25519PublicKey, "EdDSA"),
    ):
        if isinstance(key, kind) and getattr(key, "curve", _P256).name == _P256.name:
            return key, [algorithm]
    raise SettingsError("grant_public_key must be an RSA, EC P-256 or Ed25519 key")
