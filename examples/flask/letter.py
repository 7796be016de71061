"""A letter that is written while you read it, word by word: a plain generator, and no async code.

It stands for whatever takes its time: the words of a language model, a long report, a job that tells how far it is.
Over HTTP the view holds a worker of the app and is lost with the connection. Over the connection it runs in a worker
beside the app, and a page that was cut off goes on in the middle of the sentence.
"""

import logging
import re
import time
from collections.abc import Iterator

from flask import Blueprint, Response, render_template

log = logging.getLogger(__name__)
letter = Blueprint("letter", __name__)
SECONDS_PER_WORD = 0.06


@letter.get("/letter")
def show():
    return render_template("letter.html")


@letter.get("/letter/text")
def text():
    return Response(write(), content_type="text/plain; charset=utf-8")  # no Content-Length: it streams


def write() -> Iterator[str]:
    try:
        for word in re.findall(r"\S+\s*", TEXT):
            time.sleep(SECONDS_PER_WORD)
            yield word
    except GeneratorExit:  # the reader pressed "Stop"
        log.warning("the letter was not read to its end")


TEXT = """\
Dear reader,

this letter is written while you read it. Somewhere a worker runs a plain Python generator: it waits a little, it \
yields a word, it waits again. It does not know who you are, or how its words reach you. There is no async in it, and \
no await.

Each word goes onto your connection's own channel, and gets its number there. Your browser knows the number of the \
last word that it received, and nothing else needs to be remembered anywhere.

So do what networks do. Switch the wireless off and on. Close the lid of the laptop in the middle of a sentence. Let \
somebody restart the server that holds your connection. The ink stops for a moment; then the words that you missed \
come all at once, and the pen goes on from there. None is lost and none is written twice, and the generator has not \
noticed.

When the last word has been yielded the generator ends, as functions do, and so does this letter.

Yours, word by word,
a view
"""
