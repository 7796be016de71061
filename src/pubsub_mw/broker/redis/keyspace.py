"""Name every key in Redis.

In:     the prefix, a channel
Out:    keys; the scripts name their KEYS in the same order
Owns:   the rule that all keys of a channel hold `{<channel>}`, so that a cluster keeps them in one slot
Never:  puts a name into a key that `model.check_channel` has not let through: no brace, no blank, no glob
"""

import hashlib

from pubsub_mw.model import Channel, ConnectionId

__all__ = ["Keyspace"]


class Keyspace:
    """The keys under one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.secret = f"{prefix}:secret"
        self._live_prefix = f"{prefix}:{{".encode()
        self._live_suffix = b"}:p"

    def position(self, channel: Channel) -> str:
        """String: the position. `publish.lua` puts `:h`, `:p` and `:i:` after it for the next three."""
        return f"{self.prefix}:{{{channel}}}"

    def history(self, channel: Channel) -> str:
        """List: payloads, the newest last; that is the one of the position."""
        return f"{self.prefix}:{{{channel}}}:h"

    def live(self, channel: Channel) -> str:
        """Pub/sub channel; carries payloads."""
        return f"{self.prefix}:{{{channel}}}:p"

    def idempotency(self, channel: Channel, key: str) -> str:
        """String: the position of the publication made with `key`, and which part it is; see `publish.lua`."""
        return f"{self.prefix}:{{{channel}}}:i:{key}"

    def presence(self, channel: Channel) -> tuple[str, str, str]:
        """Hash of entries, hash of users, sorted set of leases; their fields are named in `presence.lua`."""
        stem = f"{self.prefix}:{{{channel}}}"
        return f"{stem}:w", f"{stem}:u", f"{stem}:x"

    def revoked(self, identity: str) -> str:
        """Hash: channel, or `*` -> seconds since 1970; grants and resume tokens made until then are void for it."""
        return f"{self.prefix}:revoked:{identity}"

    def ticket(self, ticket: str) -> str:
        """String: a token that is good for nothing else. Named by a hash: who reads keys has no ticket."""
        return f"{self.prefix}:ticket:{hashlib.sha256(ticket.encode()).hexdigest()}"

    @property
    def requests(self) -> str:
        """Stream: requests for workers, or worked on; consumer group `workers`."""
        return f"{self.prefix}:{{requests}}:q"

    @property
    def lanes(self) -> tuple[str, str, str, str]:
        """What `lanes.lua` names: requests, those that wait in lanes, when to look at a lane, prefix of each lane."""
        stem = f"{self.prefix}:{{requests}}:"
        return self.requests, f"{stem}waiting", f"{stem}lanes", f"{stem}lane:"

    def lane(self, connection: ConnectionId) -> tuple[str, str]:
        """Set: ids in `requests` that run. List: what waits for that."""
        stem = f"{self.lanes[3]}{connection}"
        return f"{stem}:running", f"{stem}:waiting"

    @property
    def reports(self) -> tuple[str, str, str, str]:
        """What the lifecycle reports need: requests; hash connection -> the server that holds it; prefix, with a
        server's name after it, of hashes connection -> the report of its end; sorted set server -> until when it is
        taken to live.
        """
        stem = f"{self.prefix}:{{requests}}:"
        return self.requests, f"{stem}owners", f"{stem}held:", f"{stem}leases"

    @property
    def dead(self) -> str:
        """Stream: requests that were set aside."""
        return f"{self.prefix}:{{requests}}:dead"

    def claim(self, connection: ConnectionId, request_id: str) -> str:
        """String: there while a request is known, so that a resend is not run."""
        return f"{self.prefix}:{{requests}}:claim:{connection}:{request_id}"

    def cancelled(self, connection: ConnectionId, request_id: str) -> str:
        """String: there when the client of a request does not want its answer."""
        return f"{self.prefix}:{{requests}}:cancel:{connection}:{request_id}"

    def probe(self, server: str) -> str:
        """Pub/sub channel on which one realtime server hears itself."""
        return f"{self.prefix}:probe:{server}"

    def channel_of(self, live: bytes) -> str | None:
        """Return the channel of a pub/sub channel's name, or None if `live` did not make it."""
        if live.startswith(self._live_prefix) and live.endswith(self._live_suffix):
            return live[len(self._live_prefix) : -len(self._live_suffix)].decode("ascii", "replace")
        return None
