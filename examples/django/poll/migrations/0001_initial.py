from django.db import migrations, models

ANSWERS = ["two short flashes", "one long flash", "red and white in turn", "always on"]


def add_answers(apps, schema_editor):  # noqa: ARG001
    answer = apps.get_model("poll", "Answer")
    answer.objects.bulk_create(answer(text=text) for text in ANSWERS)


class Migration(migrations.Migration):
    initial = True

    dependencies = []  # noqa: RUF012

    operations = [  # noqa: RUF012
        migrations.CreateModel(
            name="Answer",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("text", models.CharField(max_length=40, unique=True)),
                ("votes", models.PositiveIntegerField(default=0)),
            ],
            options={
                "ordering": ("id",),
            },
        ),
        migrations.RunPython(add_answers, migrations.RunPython.noop),
    ]
