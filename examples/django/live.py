"""Tell a page from which position it goes on."""

import logging

from pubsub_mw import PubSubError

log = logging.getLogger(__name__)


def position_of(request, channel):
    """Return where the channel is now, or nothing: a page without is good too, if it says that it is not live.

    Ask before reading the state that the page shows, so that what comes between the two is told again, never missed.
    """
    try:
        return str(request.environ["pubsub.publisher"].position(channel))
    except PubSubError as error:
        log.error("a page goes out that is not live: %s", error)
        return ""
