"""Listen and request from Python: services, bots, tests, the command line. The same rules as the browser's client.

async with connect("ws://127.0.0.1:8000/realtime") as connection:
    response = await connection.fetch("/rooms/42/messages", json={"text": "hi"})
    async for message in await connection.subscribe("room:42"):
        print(message.data)
"""

from pubsub_mw.client.connection import Connection, connect
from pubsub_mw.client.ladder import backoff
from pubsub_mw.client.requests import Response
from pubsub_mw.client.subscription import Gap, Message, Presence, Subscription

__all__ = ["Connection", "Gap", "Message", "Presence", "Response", "Subscription", "backoff", "connect"]
