"""DOOR 2: the realtime server, an ASGI app that holds the standing connections.

Read `send_queue`, `subscription`, `hub`, `connection`, `websocket`, `app`: each uses only those before it.
"""

from pubsub_mw.realtime.app import Realtime

__all__ = ["Realtime"]
