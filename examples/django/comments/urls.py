from django.urls import path

from comments import login, views
from poll import views as poll

urlpatterns = [
    path("", views.article, name="article"),
    path("session", login.log_in_or_out, name="session"),
    path("comments", views.comments, name="comments"),
    path("poll", poll.poll, name="poll"),
    path("poll/bars", poll.bars, name="poll-bars"),
]
