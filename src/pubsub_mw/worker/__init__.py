"""DOOR 3: the worker, which runs the application on what clients send.

Read `environ`, `wsgi`, `asgi`, `answers`, `loop`, `processes`: each uses only those before it.
"""

from pubsub_mw.worker.loop import Worker

__all__ = ["Worker"]
