"""What the three doors share: channels with history, and pub/sub.

`interface` says what a broker promises, `codec` how a publication is stored, `redis` and `memory` are the two
engines, `engines` chooses one by its url. One test-suite holds both to the same promises.
"""
