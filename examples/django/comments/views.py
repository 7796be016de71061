from uuid import uuid4

from django.db import transaction
from django.http import HttpResponse, JsonResponse
from django.shortcuts import redirect, render
from django.views.decorators.http import require_GET, require_http_methods

from comments.models import Comment, CommentForm
from live import position_of

CHANNEL = "article:lighthouses:comments"


@require_GET
def article(request):
    position = position_of(request, CHANNEL)
    page = {"channel": CHANNEL, "position": position, "comments": Comment.objects.all(), "key": uuid4().hex}
    return render(request, "article.html", page)


@require_http_methods(["GET", "POST"])
def comments(request):
    if request.method == "GET":
        return JsonResponse([comment.as_dict() for comment in Comment.objects.all()], safe=False)
    if not request.user.is_authenticated:
        return HttpResponse("log in first", status=401)

    publish = request.environ["pubsub.publish"]
    with transaction.atomic():
        comment = Comment.objects.filter(key=request.POST.get("key")).first()  # there when the page posts again
        form = CommentForm(request.POST, instance=Comment(name=request.user.username))
        if comment is None and not form.is_valid():
            return JsonResponse(form.errors, status=400)
        comment = comment or form.save()
        transaction.on_commit(lambda: publish(CHANNEL, comment.as_dict(), idempotency_key=comment.key))
    return redirect("article") if request.accepts("text/html") else JsonResponse(comment.as_dict(), status=201)
