from uuid import uuid4

from django.conf import settings
from django.db import transaction
from django.forms import modelform_factory
from django.http import JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from comments.models import Comment

CHANNEL = "article:lighthouses:comments"
CommentForm = modelform_factory(Comment, fields=["name", "text", "key"])


@require_GET
def article(request):
    # The position is read before the comments are: what comes between the two is told again, never missed.
    position = request.environ["pubsub.publisher"].position(CHANNEL)
    page = {"channel": CHANNEL, "position": position, "comments": Comment.objects.all(), "key": uuid4().hex}
    return render(request, "article.html", page | {"realtime_url": settings.REALTIME_URL})


@require_http_methods(["GET", "POST"])
def comments(request):
    if request.method == "GET":
        return JsonResponse([comment.as_dict() for comment in Comment.objects.all()], safe=False)

    publish = request.environ["pubsub.publish"]
    with transaction.atomic():
        comment = Comment.objects.filter(key=request.POST.get("key")).first()  # there when the page posts again
        form = CommentForm(request.POST)
        if comment is None and not form.is_valid():
            return JsonResponse(form.errors, status=400)
        comment = comment or form.save()
        transaction.on_commit(lambda: publish(CHANNEL, comment.as_dict(), idempotency_key=comment.key))

    return redirect("article") if request.accepts("text/html") else JsonResponse(comment.as_dict(), status=201)
