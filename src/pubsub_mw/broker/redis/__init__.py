"""The broker as a Redis server, 6.2 or newer, or as the master that sentinels name.

`keyspace` names every key, `scripts` holds what runs inside Redis (`*.lua`), `servers` connects, `publisher` is the
synchronous door, `reader` the asynchronous one, `subscriber` keeps the one pub/sub link of a process.
"""
