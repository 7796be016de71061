"""The names of keys: one slot for each channel, and never one key for two."""

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pubsub_mw.broker.redis.keyspace import Keyspace
from pubsub_mw.model import Channel, check_channel

ALLOWED = string.ascii_letters + string.digits + "_.,:;=@/-"

channels = st.one_of(
    st.text(ALLOWED, min_size=1, max_size=200),
    st.text(ALLOWED, min_size=1, max_size=180).map(lambda name: "#connection-" + name),
    st.text(ALLOWED, min_size=1, max_size=180).map(lambda name: "#user-" + name),
    st.text(":msp", min_size=1, max_size=6),
).map(check_channel)
prefixes = st.text(string.ascii_letters + string.digits + "_.:-", min_size=1, max_size=64)
idempotency_keys = st.text(min_size=1, max_size=200)


def hash_slot(key: str) -> int:
    """Source: Redis cluster specification, "Key distribution model" and its reference CRC16 (XMODEM)."""
    data = key.encode()
    start = data.find(b"{")
    if start >= 0:
        end = data.find(b"}", start + 1)
        if end > start + 1:
            data = data[start + 1 : end]
    crc = 0
    for byte in data:
        crc ^= byte << 8
        for _ in range(8):
            crc = (crc << 1 ^ 0x1021 if crc & 0x8000 else crc << 1) & 0xFFFF
    return crc % 16_384


def keys(keyspace: Keyspace, channel: Channel, idempotency_key: str = "k") -> list[str]:
    return [
        keyspace.position(channel),
        keyspace.history(channel),
        keyspace.live(channel),
        keyspace.idempotency(channel, idempotency_key),
    ]


def test_the_reference_slot_is_that_of_the_specification() -> None:
    assert hash_slot("123456789") == 0x31C3 % 16_384
    assert hash_slot("{user1000}.following") == hash_slot("user1000")


@settings(deadline=None)
@given(prefixes, channels, idempotency_keys)
def test_all_keys_of_a_channel_are_in_its_slot(prefix: str, channel: Channel, idempotency_key: str) -> None:
    slots = {hash_slot(key) for key in keys(Keyspace(prefix), channel, idempotency_key)}
    assert slots == {hash_slot(channel)}


@settings(deadline=None)
@given(prefixes, st.lists(channels, min_size=2, max_size=4, unique=True), idempotency_keys)
def test_no_two_channels_share_a_key(prefix: str, names: list[Channel], idempotency_key: str) -> None:
    keyspace = Keyspace(prefix)
    made = [key for name in names for key in keys(keyspace, name, idempotency_key)]
    made += [keyspace.secret, keyspace.probe("1")]
    assert len(set(made)) == len(made)


@settings(deadline=None)
@given(channels, st.lists(idempotency_keys, min_size=2, max_size=2, unique=True))
def test_no_idempotency_key_is_another_key_of_the_channel(channel: Channel, pair: list[str]) -> None:
    keyspace = Keyspace("p")
    made = [*keys(keyspace, channel, pair[0]), keyspace.idempotency(channel, pair[1])]
    assert len(set(made)) == len(made)


@settings(deadline=None)
@given(prefixes, channels)
def test_the_channel_is_read_back_from_the_name_of_its_pubsub_channel(prefix: str, channel: Channel) -> None:
    keyspace = Keyspace(prefix)
    assert keyspace.channel_of(keyspace.live(channel).encode()) == channel


@pytest.mark.parametrize(
    "live", [b"", b"p:", b"p:{a}", b"p:{a}:h", b"q:{a}:p", b"p:{a:p", b"p:a}:p", b"p:probe:1", b"p:secret"]
)
def test_no_other_name_is_taken_for_a_channel(live: bytes) -> None:
    assert Keyspace("p").channel_of(live) is None


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.binary(), st.binary().map(lambda name: b"p:{" + name + b"}:p")))
def test_whatever_name_redis_delivers_it_is_a_channel_or_none(live: bytes) -> None:
    channel = Keyspace("p").channel_of(live)
    assert channel is None or live.startswith(b"p:{")
