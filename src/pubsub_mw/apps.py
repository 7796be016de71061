"""Find a web application by its name.

In:     `module`, `module:attribute` or `module:factory()`
Out:    the application, and whether it speaks ASGI or WSGI
Owns:   the sentences that say what was not found
Never:  hides an error of the application's own: it comes with its traceback
"""

import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable
from typing import Any, cast

from pubsub_mw.errors import AppNotFound

__all__ = ["is_asgi", "load_app"]


def load_app(name: str) -> Any:
    """Import an application; the working directory comes first, as with gunicorn and flask.

    Raises:
        AppNotFound: there is no such module or attribute.
    """
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py") or not all(part.isidentifier() for part in module_name.split(".")):
        raise AppNotFound(f"{name!r} is not the name of a module; name the app as myapp:app, not by its file")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not (module_name + ".").startswith(error.name + "."):
            raise
        raise AppNotFound(f"there is no module {error.name!r} here ({os.getcwd()}) or among the installed") from error
    candidates = [attribute.removesuffix("()")] if attribute else ["app", "application"]
    for candidate in candidates:
        found: Any = module
        for part in candidate.split("."):
            found = getattr(found, part, None)
        if callable(found):
            return found() if attribute.endswith("()") else found
    raise AppNotFound(f"{module_name} has no app named {' or '.join(candidates)}; name it as module:attribute")


def is_asgi(app: object) -> bool:
    """Whether `app` is an ASGI app: a coroutine function, an object that is one when called, or of three arguments."""
    while isinstance(app, functools.partial):
        app = app.func
    if inspect.iscoroutinefunction(app) or inspect.iscoroutinefunction(getattr(app, "__call__", None)):  # noqa: B004
        return True
    try:
        parameters = inspect.signature(cast(Callable[..., object], app))
    except (TypeError, ValueError):
        return False
    return _takes(parameters, 3) and not _takes(parameters, 2)


def _takes(parameters: inspect.Signature, count: int) -> bool:
    try:
        parameters.bind(*[None] * count)
    except TypeError:
        return False
    return True
