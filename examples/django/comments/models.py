from django.db import models
from django.forms import modelform_factory


class Comment(models.Model):
    name = models.CharField(max_length=40)
    text = models.TextField(max_length=2000)
    written = models.DateTimeField(auto_now_add=True)
    key = models.CharField(max_length=40, unique=True)  # from the page: to post again is no second comment

    class Meta:
        ordering = ("id",)

    def as_dict(self):
        return {"id": self.id, "name": self.name, "text": self.text, "written": self.written.isoformat()}


CommentForm = modelform_factory(Comment, fields=["text", "key"])
