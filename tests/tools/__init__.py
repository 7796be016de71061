"""What the tests stand on: real servers, real processes, real sockets and a network that can be bent.

`clock`         the unit of test time, and waiting for a thing instead of for a while
`ports`         ports that nothing else takes
`redis_server`  a private Redis that can be killed, restarted and paused
`tcp_proxy`     a network between any two ends that can freeze, lose, delay, cut and refuse
`servers`       uvicorn, gunicorn and `pubsub-mw` as processes
`nginx`         nginx with the configuration of docs/deploy/, over TLS
`npm`           packages for Node and for pages
`raw_client`    a WebSocket client that knows the wire and nothing else
`browser`       a headless Chromium

None of it imports `pubsub_mw`. Fixtures over it are in `tests/conftest.py`.
"""
