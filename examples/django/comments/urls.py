from django.urls import path

from comments import views

urlpatterns = [
    path("", views.article, name="article"),
    path("comments", views.comments, name="comments"),
]
