"""Grants and resume tokens: what is signed with the right key and says the right things, and nothing else."""

import base64
import hashlib
import hmac
import json
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.errors import ChannelError, GrantError, GrantExpired, SettingsError
from pubsub_mw.grants import GrantVerifier, Resume, sign_grant, sign_resume, verify_resume
from pubsub_mw.model import ConnectionId, Grant, Position

SECRET = "the secret of these tests, of 32 bytes or more"
OTHER = "some other secret, that is long enough as well"
NOW = 1_700_000_000.0

RSA_KEY = rsa.generate_private_key(65_537, 2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def public_pem(key: Any) -> str:
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert isinstance(pem, bytes)
    return pem.decode()


def signed(claims: object, key: Any = SECRET, algorithm: str = "HS256", **headers: object) -> str:
    """Make a token as a stranger would, without the code under test."""
    if isinstance(claims, dict):
        claims = {"exp": NOW + 60, **claims}
    header = {"typ": "JWT", "alg": algorithm, **headers}
    head, body = (_base64(json.dumps(part).encode()) for part in (header, claims))
    text = head + b"." + body
    if algorithm == "none":
        return (text + b".").decode()
    if algorithm.startswith("HS"):
        digest = {"HS256": hashlib.sha256, "HS384": hashlib.sha384, "HS512": hashlib.sha512}[algorithm]
        signature = hmac.new(key.encode() if isinstance(key, str) else key, text, digest).digest()
    else:
        signature = jwt.get_algorithm_by_name(algorithm).sign(text, key)
    return (text + b"." + _base64(signature)).decode()


def _base64(data: bytes) -> bytes:
    return base64.urlsafe_b64encode(data).rstrip(b"=")


def test_a_grant_says_what_was_signed() -> None:
    token = sign_grant(
        SECRET, now=NOW, expires=60, user="7", channels=("room:*",), publish=("room:1",), info={"name": "Ann"}
    )
    assert GrantVerifier(SECRET).verify(token, now=NOW) == Grant(
        user="7",
        channels=("room:*",),
        publish=("room:1",),
        info={"name": "Ann"},
        issued_at=NOW,
        expires_at=NOW + 60,
    )


def test_a_grant_for_nobody_allows_nothing() -> None:
    grant = GrantVerifier(SECRET).verify(sign_grant(SECRET, now=NOW, expires=60), now=NOW)
    assert (grant.user, grant.channels, grant.publish, grant.info) == (None, (), (), None)


def test_a_user_that_cannot_be_part_of_a_channel_is_refused_when_signing() -> None:
    for user in ("a b", "", "é", "a" * 200, "#"):
        with pytest.raises(ChannelError):
            sign_grant(SECRET, now=NOW, expires=60, user=user)


def test_a_grant_expires_at_exp_and_not_before() -> None:
    token = sign_grant(SECRET, now=NOW, expires=60)
    verifier = GrantVerifier(SECRET)
    assert verifier.verify(token, now=NOW + 59.9).expires_at == NOW + 60
    for late in (60, 61, 1e9):
        with pytest.raises(GrantExpired, match="expired"):
            verifier.verify(token, now=NOW + late)


def test_a_grant_is_good_from_nbf_on() -> None:
    token = signed({"nbf": NOW + 10})
    with pytest.raises(GrantError, match="not valid yet"):
        GrantVerifier(SECRET).verify(token, now=NOW)
    assert GrantVerifier(SECRET).verify(token, now=NOW + 10).expires_at == NOW + 60


def test_a_token_of_any_jwt_library_is_a_grant() -> None:
    claims = {"sub": "7", "exp": int(NOW) + 60, "iat": int(NOW), "channels": ["a"], "aud": "x", "iss": "y", "jti": "z"}
    assert GrantVerifier(SECRET).verify(jwt.encode(claims, SECRET, "HS256"), now=NOW).user == "7"


@pytest.mark.parametrize(
    "token",
    [
        pytest.param(signed({}, algorithm="none"), id="alg none"),
        pytest.param(signed({}, alg="None"), id="alg None"),
        pytest.param(signed({}, alg=""), id="alg empty"),
        pytest.param(signed({}, alg=None), id="alg null"),
        pytest.param(signed({}, alg=["HS256"]), id="alg a list"),
        pytest.param(signed({}, algorithm="HS512"), id="right secret, another hash"),
        pytest.param(signed({}, OTHER), id="another secret"),
        pytest.param(signed({}, ""), id="empty secret"),
        pytest.param(signed({}, RSA_KEY, "RS256"), id="RS256"),
        pytest.param(signed({}, EC_KEY, "ES256"), id="ES256"),
        pytest.param(signed({}, OTHER, jwk={"kty": "oct", "k": "AAAA"}), id="a key of its own"),
        pytest.param(signed({}, OTHER, jku="http://127.0.0.1:1/keys"), id="a key elsewhere"),
        pytest.param(signed({}, "", kid="../../dev/null"), id="kid as a path"),
        pytest.param(signed({}, crit=["x"], x=1), id="a critical header nobody knows"),
        pytest.param(signed({})[:-1], id="signature cut"),
        pytest.param(signed({}) + "A", id="signature longer"),
        pytest.param(signed({}).rpartition(".")[0] + ".", id="signature gone"),
    ],
)
def test_what_was_not_signed_by_us_is_refused(token: str) -> None:
    with pytest.raises(GrantError) as caught:
        GrantVerifier(SECRET).verify(token, now=NOW)
    assert not isinstance(caught.value, GrantExpired)


def test_a_bit_flipped_anywhere_makes_a_grant_invalid() -> None:
    token = sign_grant(SECRET, now=NOW, expires=60, user="7")
    verifier = GrantVerifier(SECRET)
    for index, character in enumerate(token[:-1]):  # the last one holds bits that base64 ignores
        changed = token[:index] + ("A" if character != "A" else "B") + token[index + 1 :]
        with pytest.raises(GrantError):
            verifier.verify(changed, now=NOW)


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": None},
        {"exp": "soon"},
        {"exp": True},
        {"exp": [NOW + 60]},
        {"exp": float("inf")},
        {"exp": float("nan")},
        {"exp": 10**400},
        {"iat": "x"},
        {"iat": True},
        {"nbf": "x"},
        {"nbf": None},
        {"nbf": float("nan")},
        {"sub": 7},
        {"sub": ["7"]},
        {"sub": ""},
        {"sub": "a b"},
        {"sub": "a" * 300},
        {"channels": "room:*"},
        {"channels": {"room": 1}},
        {"channels": [1]},
        {"channels": None},
        {"publish": "*"},
        {"publish": [["*"]]},
    ],
    ids=str,
)
def test_a_claim_of_the_wrong_shape_makes_a_grant_invalid(claims: dict[str, object]) -> None:
    with pytest.raises(GrantError) as caught:
        GrantVerifier(SECRET).verify(signed(claims), now=NOW)
    assert not isinstance(caught.value, GrantExpired)


@pytest.mark.parametrize("claims", [[], "text", 7, None, [{"exp": NOW + 60}]])
def test_claims_are_an_object(claims: object) -> None:
    with pytest.raises(GrantError):
        GrantVerifier(SECRET).verify(signed(claims), now=NOW)


def test_a_grant_without_exp_is_invalid() -> None:
    token = jwt.encode({"sub": "7", "channels": ["*"]}, SECRET, "HS256")
    with pytest.raises(GrantError, match="exp"):
        GrantVerifier(SECRET).verify(token, now=NOW)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.text("abcDEF012._-=", max_size=60), st.lists(st.binary(), max_size=4)))
def test_any_other_text_raises_nothing_but_a_grant_error(parts: str | list[bytes]) -> None:
    token = parts if isinstance(parts, str) else b".".join(_base64(part) for part in parts).decode()
    with pytest.raises(GrantError):
        GrantVerifier(SECRET).verify(token, now=NOW)
    with pytest.raises(GrantError):
        verify_resume(SECRET, token, now=NOW)


@pytest.mark.parametrize("part", [b"[" * 40_000, b'{"alg":' * 10_000, b'{"alg":"HS256","x":' + b"[" * 30_000])
def test_nesting_in_an_unsigned_token_is_no_more_than_invalid(part: bytes) -> None:
    token = (_base64(part) + b".e30.e30").decode()
    with pytest.raises(GrantError):
        GrantVerifier(SECRET).verify(token, now=NOW)


@pytest.mark.parametrize("token", ["\ud800", "é.é.é", "a.b.\ud800"])
def test_a_token_beyond_ascii_is_invalid(token: str) -> None:
    with pytest.raises(GrantError):
        GrantVerifier(SECRET).verify(token, now=NOW)
    with pytest.raises(GrantError):
        verify_resume(SECRET, token, now=NOW)


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(RSA_KEY, "RS256"), (EC_KEY, "ES256"), (ED_KEY, "EdDSA")],
    ids=["RSA", "EC", "Ed25519"],
)
def test_a_public_key_verifies_what_its_private_key_signed(key: Any, algorithm: str) -> None:
    verifier = GrantVerifier(SECRET, public_pem(key))
    assert verifier.verify(signed({"sub": "7"}, key, algorithm), now=NOW).user == "7"
    with pytest.raises(GrantExpired):
        verifier.verify(signed({"exp": NOW}, key, algorithm), now=NOW)


@pytest.mark.parametrize("key", [RSA_KEY, EC_KEY, ED_KEY], ids=["RSA", "EC", "Ed25519"])
def test_with_a_public_key_nothing_else_verifies(key: Any) -> None:
    pem = public_pem(key)
    verifier = GrantVerifier(SECRET, pem)
    stranger = rsa.generate_private_key(65_537, 2048)
    for token in (
        signed({}, SECRET),  # the secret counts no more
        signed({}, pem),  # the public key taken for a secret, whose text everybody knows
        signed({}, pem.encode(), "HS512"),
        signed({}, algorithm="none"),
        signed({}, stranger, "RS256"),
        signed({}, stranger, "PS256"),
        signed({}, ec.generate_private_key(ec.SECP256R1()), "ES256"),
        signed({}, ed25519.Ed25519PrivateKey.generate(), "EdDSA"),
        signed({}, OTHER, alg="RS256"),
    ):
        with pytest.raises(GrantError):
            verifier.verify(token, now=NOW)


@pytest.mark.parametrize(
    "pem",
    [
        "not a key",
        "",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n",
        RSA_KEY.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode(),
        public_pem(dsa.generate_private_key(1024)),
        public_pem(ec.generate_private_key(ec.SECP384R1())),
        public_pem(ec.generate_private_key(ec.SECP256K1())),
    ],
    ids=["text", "empty", "broken", "private key", "DSA", "P-384", "secp256k1"],
)
def test_a_key_that_could_not_verify_is_refused_at_once(pem: str) -> None:
    with pytest.raises(SettingsError, match="grant_public_key"):
        GrantVerifier(SECRET, pem)


RESUME = Resume(
    connection=ConnectionId("c1"),
    grant=Grant(user="7", channels=("room:*",), publish=("a",), info=[1], issued_at=NOW - 5.0, expires_at=NOW + 5.0),
    user_position=Position("e", 3, "t"),
    issued_at=NOW,
)


@pytest.mark.parametrize(
    "resume",
    [RESUME, Resume(connection=ConnectionId("c2"), grant=None, user_position=None, issued_at=NOW)],
    ids=["with a grant", "without one"],
)
def test_a_resume_token_restores_what_it_was_made_of(resume: Resume) -> None:
    assert verify_resume(SECRET, sign_resume(SECRET, resume, expires=60), now=NOW + 59) == resume


def test_a_resume_token_outlives_the_grant_inside_and_then_expires() -> None:
    token = sign_resume(SECRET, RESUME, expires=60)
    grant = verify_resume(SECRET, token, now=NOW + 30).grant
    assert grant is not None
    assert grant.expires_at == NOW + 5
    with pytest.raises(GrantExpired):
        verify_resume(SECRET, token, now=NOW + 60)


def test_a_resume_token_is_no_grant_and_a_grant_no_resume_token() -> None:
    grant = sign_grant(SECRET, now=NOW, expires=60, user="7", channels=("*",))
    resume = sign_resume(SECRET, RESUME, expires=60)
    with pytest.raises(GrantError):
        GrantVerifier(SECRET).verify(resume, now=NOW)
    with pytest.raises(GrantError):
        verify_resume(SECRET, grant, now=NOW)
    with pytest.raises(GrantError):
        verify_resume(SECRET, signed({"cid": "c1", "iat": NOW}), now=NOW)


def test_a_resume_token_of_another_secret_is_refused() -> None:
    with pytest.raises(GrantError):
        verify_resume(SECRET, sign_resume(OTHER, RESUME, expires=60), now=NOW)
    with pytest.raises(GrantError):
        verify_resume(SECRET, signed({"cid": "c1", "iat": NOW}, algorithm="none"), now=NOW)


def test_a_token_made_for_another_use_restores_nothing() -> None:
    resume = Resume(connection=ConnectionId("c1"), grant=None, user_position=None, issued_at=1_000.0)
    for use, other in (("resume", "ticket"), ("ticket", "resume"), ("news", "ticket")):
        token = sign_resume(SECRET, resume, expires=60, use=use)
        assert verify_resume(SECRET, token, now=1_001.0, use=use) == resume
        with pytest.raises(GrantError):
            verify_resume(SECRET, token, now=1_001.0, use=other)


def test_channels_travel_in_a_resume_token() -> None:
    channels = {"room:42": "e.1.t", "news": None}
    resume = Resume(connection=ConnectionId("c1"), grant=None, user_position=None, issued_at=1_000.0, channels=channels)
    assert verify_resume(SECRET, sign_resume(SECRET, resume, expires=60), now=1_001.0).channels == channels


def resume_key(use: str = "resume") -> str:
    return hmac.new(SECRET.encode(), f"pubsub-mw {use} token".encode(), hashlib.sha256).hexdigest()


def test_a_resume_token_is_a_jwt_that_others_can_check() -> None:
    token = sign_resume(SECRET, RESUME, expires=60)
    claims = jwt.decode(token, resume_key(), algorithms=["HS256"], options={"verify_exp": False, "verify_iat": False})
    assert claims["cid"] == RESUME.connection
    # One that was made by the library is taken, as by a server of an older version.
    assert verify_resume(SECRET, jwt.encode(claims, resume_key(), algorithm="HS256"), now=NOW) == RESUME


def test_a_resume_token_that_differs_in_any_character_is_refused() -> None:
    token = sign_resume(SECRET, RESUME, expires=60)
    for index in range(len(token)):
        other = "A" if token[index] != "A" else "B"
        for altered in (token[:index] + other + token[index + 1 :], token[:index] + token[index + 1 :]):
            with pytest.raises(GrantError):
                verify_resume(SECRET, altered, now=NOW)
    for altered in (
        "",
        ".",
        "..",
        "...",
        token + ".",
        "." + token,
        token + "=",
        token + "\n",
        token + "ä",
        token + "\ud800",
    ):
        with pytest.raises(GrantError):
            verify_resume(SECRET, altered, now=NOW)


@pytest.mark.parametrize(
    "header", [{"alg": "none"}, {"alg": "HS512", "typ": "JWT"}, {"alg": "HS256"}, {"typ": "JWT", "alg": "HS256"}]
)
def test_a_resume_token_has_one_header_and_its_algorithm_is_not_asked_for(header: dict[str, str]) -> None:
    _, payload, _ = sign_resume(SECRET, RESUME, expires=60).split(".")
    content = f"{_base64(json.dumps(header).encode()).decode()}.{payload}"
    signature = _base64(hmac.digest(resume_key().encode(), content.encode(), "sha256")).decode()
    for forged in (f"{content}.", f"{content}.{signature}"):
        with pytest.raises(GrantError):
            verify_resume(SECRET, forged, now=NOW)


def test_a_number_of_any_size_survives_in_the_grant_of_a_resume_token() -> None:
    grant = Grant(user="7", channels=(), publish=(), info={"n": 1 << 200}, issued_at=NOW, expires_at=NOW + 60)
    resume = Resume(connection=ConnectionId("c"), grant=grant, user_position=None, issued_at=NOW)
    assert verify_resume(SECRET, sign_resume(SECRET, resume, expires=60), now=NOW) == resume
