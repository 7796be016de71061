"""Settings: from arguments and the environment, checked when they are built."""

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.errors import SettingsError
from pubsub_mw.settings import Settings

NUMBERS = [knob for knob in dataclasses.fields(Settings) if knob.metadata]


def build(**overrides: Any) -> Settings:
    return Settings.build(environ={}, **overrides)


def test_without_anything_the_documented_defaults_hold() -> None:
    built = build()
    assert (built.url, built.secret, built.prefix) == ("memory://", None, "pubsub")
    assert (built.history_size, built.history_ttl, built.private_history_size) == (100, 300, 1000)
    assert (built.publish_timeout, built.idempotency_ttl) == (2, 300)
    assert (built.max_frame_bytes, built.max_publication_bytes, built.send_queue_bytes) == (65_536, 1 << 20, 1 << 20)
    assert (built.max_channels, built.max_connections_per_address) == (128, 0)
    assert (built.ping_interval, built.ping_timeout, built.drain) == (25, 8, 25)
    assert (built.public, built.origins) == (("*",), ())


def test_every_setting_can_come_from_the_environment() -> None:
    texts: dict[str, tuple[str, object]] = {
        "url": ("redis://h:1/0", "redis://h:1/0"),
        "secret": ("s", "s"),
        "grant_public_key": ("PEM", "PEM"),
        "prefix": ("p", "p"),
        "origins": ("https://a.example  http://b.example:8000", ("https://a.example", "http://b.example:8000")),
        "public": ("room:* news", ("room:*", "news")),
        "requests": ("/rooms/* /news", ("/rooms/*", "/news")),
        "request_headers": ("x-a x-b", ("x-a", "x-b")),
        "authorize": ("/may", "/may"),
        "lifecycle": ("/told", "/told"),
        "position_ttl": ("90000", 90_000.0),
    }
    for knob in NUMBERS:
        default = knob.default
        assert isinstance(default, (int, float))
        texts.setdefault(knob.name, (str(default + 1), default + 1))
    assert texts.keys() == {knob.name for knob in dataclasses.fields(Settings)}
    built = Settings.build(environ={"PUBSUB_" + name.upper(): text for name, (text, _) in texts.items()})
    assert {name: getattr(built, name) for name in texts} == {name: value for name, (_, value) in texts.items()}


def test_the_environment_of_the_process_is_read_when_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PUBSUB_PREFIX", "from-env")
    assert Settings.build().prefix == "from-env"


def test_an_argument_wins_over_the_environment() -> None:
    environ = {"PUBSUB_URL": "redis://env/0", "PUBSUB_HISTORY_SIZE": "5", "PUBSUB_PREFIX": "env"}
    built = Settings.build("redis://argument/0", environ=environ, history_size=6)
    assert (built.url, built.history_size, built.prefix) == ("redis://argument/0", 6, "env")


def test_an_empty_variable_is_as_none_at_all() -> None:
    assert Settings.build(environ={"PUBSUB_SECRET": "", "PUBSUB_HISTORY_SIZE": ""}) == build()


def test_an_unknown_name_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(SettingsError, match=r"no setting 'histroy_size'.*history_size"):
        build(histroy_size=5)


@pytest.mark.parametrize("knob", NUMBERS, ids=lambda knob: knob.name)
def test_every_number_has_bounds_that_hold(knob: "dataclasses.Field[float]") -> None:
    low, high = knob.metadata["minimum"], knob.metadata["maximum"]
    for value in (low - 1, high * 2 + 1, 10**400, -math.inf, math.inf, math.nan):
        with pytest.raises(SettingsError, match=knob.name):
            build(**{knob.name: value})
        with pytest.raises(SettingsError, match=rf"(?i){knob.name}"):
            Settings.build(environ={"PUBSUB_" + knob.name.upper(): str(value)})


@pytest.mark.parametrize("value", [None, True, "x", "", [], b"5", "1e", {"a": 1}])
@pytest.mark.parametrize("name", ["history_size", "history_ttl"])
def test_what_is_not_a_number_is_refused(name: str, value: object) -> None:
    with pytest.raises(SettingsError, match=name):
        build(**{name: value})


def test_a_count_is_whole() -> None:
    assert build(history_size=5.0).history_size == 5
    with pytest.raises(SettingsError, match="whole number"):
        build(history_size=5.5)
    with pytest.raises(SettingsError, match="not a number"):
        build(history_size="5.5")


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from([knob.name for knob in dataclasses.fields(Settings)]),
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.lists(st.text())),
)
def test_a_wrong_value_never_raises_anything_but_a_settings_error(name: str, value: object) -> None:
    try:
        built = build(**{name: value})
    except SettingsError:
        return
    assert Settings(**built.overrides()) == built


@pytest.mark.parametrize("prefix", ["", "a b", "a{b", "a*", "a\n", "é", "a" * 65, "a}"])
def test_a_prefix_cannot_break_a_key(prefix: str) -> None:
    with pytest.raises(SettingsError, match="prefix"):
        build(prefix=prefix)


@pytest.mark.parametrize("secret", ["", "-----BEGIN PUBLIC KEY-----\nMIIB\n-----END PUBLIC KEY-----\n"])
def test_a_secret_that_keeps_no_secret_is_refused(secret: str) -> None:
    with pytest.raises(SettingsError, match="secret"):
        build(secret=secret)


@pytest.mark.parametrize("origin", ["example.com", "https://", "https://a/path", "https://a b", "https://a?x", "null"])
def test_an_origin_is_scheme_and_host(origin: str) -> None:
    with pytest.raises(SettingsError, match="origin"):
        build(origins=[origin])


@pytest.mark.parametrize(
    "requests", ["rooms/*", "x", "/rooms/* news", ["https://example.com/rooms/*"], [""], "?x", True]
)
def test_a_pattern_that_no_path_can_match_is_refused(requests: object) -> None:
    with pytest.raises(SettingsError, match="requests"):
        build(requests=requests)


@pytest.mark.parametrize("requests", ["", "*", "/*", "*/messages /rooms/*"])
def test_a_pattern_of_paths_begins_with_a_slash_or_any_text(requests: str) -> None:
    assert build(requests=requests).requests == tuple(requests.split())


def test_lists_may_be_given_as_text_or_as_any_collection() -> None:
    expected = ("https://a", "https://b")
    for value in ("https://a https://b", list(expected), expected):
        assert build(origins=value).origins == expected
    assert set(build(origins=set(expected)).origins) == set(expected)
    with pytest.raises(SettingsError, match="origins"):
        build(origins=[1])


def test_history_cannot_outlive_the_position_it_is_found_by() -> None:
    with pytest.raises(SettingsError, match="position_ttl"):
        build(history_ttl=10, position_ttl=9)
    assert build(history_ttl=10, position_ttl=10).history_ttl == 10


def test_overrides_build_the_same_settings_again() -> None:
    built = build(url="redis://h/0", secret="s", history_size=7, origins="https://a")
    assert Settings.build(environ={"PUBSUB_PREFIX": "other"}, **built.overrides()) == built


def test_settings_cannot_be_changed() -> None:
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        build().prefix = "other"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("memory://", "memory://"),
        ("redis://h:6379/0", "redis://h:6379/0"),
        ("redis://user@h/0", "redis://user@h/0"),
        ("redis://:sesame@h:6379/0", "redis://:***@h:6379/0"),
        ("rediss://user:sesame@h:6379/0?x=1", "rediss://user:***@h:6379/0?x=1"),
        ("redis://user:ses@me@h:6379/0", "redis://user:***@h:6379/0"),
        ("unix://user:sesame@/run/redis.sock?db=1", "unix://user:***@/run/redis.sock?db=1"),
        ("unix:///run/redis.sock?db=1&password=sesame", "unix:///run/redis.sock?db=1&password=***"),
        ("redis://h/0?password=sesame&db=1", "redis://h/0?password=***&db=1"),
        (
            "redis+sentinel://u:sesame@h:1,i:2/m/0?sentinel_password=sesame",
            "redis+sentinel://u:***@h:1,i:2/m/0?sentinel_password=***",
        ),
    ],
)
def test_the_url_for_logs_hides_the_password_alone(url: str, shown: str) -> None:
    assert build(url=url).safe_url == shown


@pytest.mark.parametrize(
    "url", ["redis://:ses#sesame@h:1/0", "redis://:ses/sesame@h:1/0", "redis://:ses?sesame@h/0", "redis://:sesame@[h/0"]
)
def test_even_a_broken_url_hides_its_password(url: str) -> None:
    assert "ses" not in build(url=url).safe_url
