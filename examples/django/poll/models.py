from django.db import models


class Answer(models.Model):
    text = models.CharField(max_length=40, unique=True)
    votes = models.PositiveIntegerField(default=0)

    class Meta:
        ordering = ("id",)
