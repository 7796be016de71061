"""Log in by a name alone: whoever says it has it. A login of your own goes here; realtime has no part in it."""

from django.contrib.auth import login, logout
from django.contrib.auth.models import User
from django.shortcuts import redirect
from django.views.decorators.http import require_POST


@require_POST
def log_in_or_out(request):
    logout(request)
    if name := request.POST.get("name", "").strip()[:40]:
        login(request, User.objects.get_or_create(username=name)[0])
    return redirect("article")
