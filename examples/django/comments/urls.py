from django.urls import path

from comments import login, views

urlpatterns = [
    path("", views.article, name="article"),
    path("session", login.log_in_or_out, name="session"),
    path("comments", views.comments, name="comments"),
]
