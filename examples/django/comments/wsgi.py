import os

from django.core.wsgi import get_wsgi_application

from pubsub_mw import PubSub

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "comments.settings")
application = PubSub(get_wsgi_application())
