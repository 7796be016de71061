from django.db import models


class Comment(models.Model):
    name = models.CharField(max_length=40)
    text = models.TextField(max_length=2000)
    written = models.DateTimeField(auto_now_add=True)
    key = models.CharField(
        max_length=40, unique=True
    )  # made by the page, so that posting again is not a second comment

    class Meta:
        ordering = ("id",)

    def as_dict(self):
        return {"id": self.id, "name": self.name, "text": self.text, "written": self.written.isoformat()}
