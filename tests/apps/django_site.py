"""A Django site without a database: sessions in cookies, CSRF protection as `startproject` sets it up."""

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse, JsonResponse
from django.middleware.csrf import get_token
from django.urls import path

from pubsub_mw import PubSub

__all__ = ["application"]

if not settings.configured:
    settings.configure(
        SECRET_KEY="of the tests",
        ALLOWED_HOSTS=["site.example"],
        ROOT_URLCONF=__name__,
        SESSION_ENGINE="django.contrib.sessions.backends.signed_cookies",
        SECURE_PROXY_SSL_HEADER=None,
        MIDDLEWARE=[
            "django.contrib.sessions.middleware.SessionMiddleware",
            "django.middleware.common.CommonMiddleware",
            "django.middleware.csrf.CsrfViewMiddleware",
        ],
    )
    django.setup()


def token(request: HttpRequest) -> HttpResponse:
    request.session["user"] = "ada"
    return HttpResponse(get_token(request))


def say(request: HttpRequest) -> HttpResponse:
    connection = request.environ["pubsub.connection"]
    publish = request.environ["pubsub.publish"]
    publish("room", request.POST["text"], exclude=connection.id if connection else None)
    return JsonResponse({"user": request.session.get("user")}, status=201)


def later(request: HttpRequest, status: int) -> HttpResponse:
    request.environ["pubsub.publish"].on_success("room", status)
    return HttpResponse(status=status)


def fail(request: HttpRequest) -> HttpResponse:
    request.environ["pubsub.publish"].on_success("room", "never")
    raise RuntimeError("a fault of the application")


urlpatterns = [path("token", token), path("say", say), path("later/<int:status>", later), path("fail", fail)]
application = PubSub(get_wsgi_application())
