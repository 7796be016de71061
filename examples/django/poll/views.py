"""A poll with htmx: the view publishes a piece of rendered HTML, and every open page puts it in place.

There is no script of ours on the page, and none of pubsub-mw's: htmx listens to server-sent events.
"""

from django.db import transaction
from django.db.models import F
from django.http import HttpResponse, HttpResponseBadRequest
from django.shortcuts import redirect, render
from django.template.loader import render_to_string
from django.views.decorators.http import require_GET, require_http_methods

from live import position_of
from poll.models import Answer

CHANNEL = "poll:lights"


@require_http_methods(["GET", "POST"])
def poll(request):
    if request.method == "GET":
        position = position_of(request, CHANNEL)
        return render(request, "poll.html", {"channel": CHANNEL, "position": position, "bars": render_bars()})

    publish = request.environ["pubsub.publish"]
    with transaction.atomic():
        list(Answer.objects.select_for_update())
        if not Answer.objects.filter(text=request.POST.get("answer")).update(votes=F("votes") + 1):
            return HttpResponseBadRequest("there is no such answer")
        # While this transaction holds the lock, so that the pieces are published in the order of the votes.
        publish(CHANNEL, render_bars())
    return HttpResponse(status=204) if "HX-Request" in request.headers else redirect("poll")


@require_GET
def bars(request):  # noqa: ARG001
    return HttpResponse(render_bars())


def render_bars():
    answers = list(Answer.objects.all())
    return render_to_string("bars.html", {"answers": answers, "most": max(1, *(answer.votes for answer in answers))})
