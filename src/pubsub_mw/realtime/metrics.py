"""Tell Prometheus how this server is doing.

In:     numbers that the hub, the connections and the request gate count for themselves; the broker's word on its queue
Out:    the metrics of this process, as text; under `pubsub-mw ... --workers`, of all processes, each by its number
Owns:   the metrics' names; how late the event loop is; a socket at which the other processes ask for what is here
Never:  is called for a publication or a subscriber; names a channel, a user or an address; waits longer than
        `BOUND_SECONDS` for the broker, or for the other processes

Nothing is put into `prometheus_client`'s own registry, which belongs to the application, and none of its objects that
count are used, which would go by the application's PROMETHEUS_MULTIPROC_DIR.
"""

import asyncio
import contextlib
import logging
import os
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from itertools import accumulate
from typing import Any, NoReturn

from prometheus_client import ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.parser import text_string_to_metric_families

from pubsub_mw.errors import BrokerUnavailable, CloseCode, ErrorCode
from pubsub_mw.realtime.shared import Shared
from pubsub_mw.realtime.subscription import GapReason

__all__ = ["BOUND_SECONDS", "SIBLINGS_VARIABLE", "Metrics"]

log = logging.getLogger("pubsub_mw")

BOUND_SECONDS = 1.0
"""For the broker's answer, and then for those of the other processes. Prometheus gives up after 10 s, by default."""

SIBLINGS_VARIABLE = "PUBSUB_METRICS_DIR"
"""Names the directory in which the processes of one server find each other's sockets, each named by its number."""

_LAG_INTERVAL_SECONDS = 0.25
_LAG_BOUNDS_SECONDS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
_TRANSPORTS = ("websocket", "sse", "longpoll")
_REFUSALS = (ErrorCode.FORBIDDEN, ErrorCode.BUSY, ErrorCode.UNAVAILABLE)
_VERSION = {version("pubsub-mw"): 1}


class Metrics:
    """The metrics of one `Realtime`."""

    def __init__(self) -> None:
        self._directory = os.environ.get(SIBLINGS_VARIABLE)
        self._process = ProcessCollector(registry=None)
        self._lags = [0] * (len(_LAG_BOUNDS_SECONDS) + 1)
        self._lag_seconds = 0.0
        self.refused: Counter[ErrorCode] = Counter()
        """Of who was turned away before a connection or a POST began."""

    async def run(self, shared: Shared) -> NoReturn:
        """Measure how late the event loop is, and answer the other processes, for ever."""
        loop = asyncio.get_running_loop()
        server = await self._listen(self._directory, shared) if self._directory else None
        try:
            while True:
                due = loop.time() + _LAG_INTERVAL_SECONDS
                await asyncio.sleep(_LAG_INTERVAL_SECONDS)
                lag = max(0.0, loop.time() - due)
                self._lags[bisect_left(_LAG_BOUNDS_SECONDS, lag)] += 1
                self._lag_seconds += lag
        finally:
            if server is not None:
                server.close()

    async def tell(self, accept: str, shared: Shared | None) -> tuple[bytes, str]:
        """Return the metrics in the form that an `Accept` header asks for, and its media type.

        Args:
            accept: the header, or ""
            shared: None = the broker has not answered yet, and there are no connections
        """
        queue: list[Metric] = []
        if shared is not None:
            with contextlib.suppress(BrokerUnavailable, TimeoutError):
                async with asyncio.timeout(BOUND_SECONDS):
                    counts = await shared.broker.queue_counts()
                about = "Requests in the broker, the same from every server: take max, not sum."
                queue.append(_family(GaugeMetricFamily, "queue_requests", about, counts, "state"))
        encode, media_type = choose_encoder(accept)
        own, others = self._read(shared), await self._ask_all(self._directory) if self._directory else None
        return await asyncio.to_thread(lambda: encode(self._whole(own, others, queue))), media_type

    def _read(self, shared: Shared | None) -> list[Metric]:
        """Read the numbers, on the event loop they belong to."""
        lags = zip(map(str, [*_LAG_BOUNDS_SECONDS, "+Inf"]), accumulate(self._lags), strict=True)
        about_lag = "How late the event loop was, looked at four times a second."
        is_up = shared is not None and shared.hub.is_up
        rows = [
            (GaugeMetricFamily, "build_info", "The version of pubsub-mw; always 1.", _VERSION, "version"),
            (GaugeMetricFamily, "broker_up", "Whether publications arrive from the broker.", is_up),
            (CounterMetricFamily, "connections_refused", "Turned away at once.", self.refused, "code", _REFUSALS),
            *(_rows(shared) if shared is not None else ()),
        ]
        lag = HistogramMetricFamily("pubsub_event_loop_lag_seconds", about_lag, list(lags), self._lag_seconds)
        return [lag, *(_family(*row) for row in rows)]

    def _whole(self, own: list[Metric], others: Mapping[str, str] | None, queue: list[Metric]) -> "_Whole":
        """Put together what is told. In a thread, because the system is asked about the process."""
        own = [*own, *self._process.collect()]
        if others is None:
            return _Whole([*own, *queue])
        merged: dict[str, Metric] = {}
        parsed = {process: text_string_to_metric_families(text) for process, text in others.items()}
        for process, families in {str(os.getpid()): own, **parsed}.items():
            for family in families:
                samples = [sample._replace(labels={**sample.labels, "process": process}) for sample in family.samples]
                whole = merged.setdefault(family.name, family)
                whole.samples = samples if whole is family else whole.samples + samples
        return _Whole([*merged.values(), *queue])

    # The other processes.

    async def _listen(self, directory: str, shared: Shared) -> asyncio.Server | None:
        async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            own = self._read(shared)
            writer.write(await asyncio.to_thread(lambda: generate_latest(self._whole(own, None, []))))
            writer.close()

        try:
            return await asyncio.start_unix_server(answer, os.path.join(directory, str(os.getpid())))
        except OSError as error:
            log.warning("the metrics of this process are not told by the others: %s", error)
            return None

    async def _ask_all(self, directory: str) -> dict[str, str]:
        """Return what each other process tells, as text; of those that have ended, or do not answer, nothing."""
        names = set(await asyncio.to_thread(os.listdir, directory)) - {str(os.getpid())}
        texts = await asyncio.gather(*(self._ask(os.path.join(directory, name)) for name in names))
        return {name: text for name, text in zip(names, texts, strict=True) if text.endswith("\n")}

    async def _ask(self, path: str) -> str:
        with contextlib.suppress(OSError):
            async with asyncio.timeout(BOUND_SECONDS):
                reader, writer = await asyncio.open_unix_connection(path)
                with contextlib.closing(writer):
                    return (await reader.read()).decode()
        return ""


class _Whole(list[Metric]):
    """What is told at one time, as the library wants it."""

    def collect(self) -> Iterable[Metric]:
        return self


def _rows(shared: Shared) -> list[tuple[Any, ...]]:
    """Return arguments of `_family`, of all that only a server that has begun can tell."""
    hub, gate, gauge, counter = shared.hub, shared.gate, GaugeMetricFamily, CounterMetricFamily
    ends, codes = "Connections that ended, by close code; client: not by the server.", (None, *CloseCode)
    recovered = "Subscriptions that named a position, by whether it could be told what was missed."
    refused = (ErrorCode.BAD_FRAME, *_REFUSALS)
    return [
        (gauge, "connections", "Connections that are open.", shared.present, "transport", _TRANSPORTS),
        (counter, "connections_opened", "Connections; each poll is one.", shared.opened, "transport", _TRANSPORTS),
        (counter, "connections_closed", ends, shared.closed, "code", codes),
        (gauge, "channels", "Channels that connections listen to.", hub.channel_count),
        (gauge, "subscriptions", "Subscriptions of all connections.", hub.subscription_count),
        (counter, "publications_delivered", "Live publications, times their listeners.", hub.publications_delivered),
        (counter, "gaps", "Gaps told to live listeners.", hub.gaps_told, "reason", GapReason),
        (counter, "recoveries", recovered, hub.recoveries, "recovered", (True, False)),
        (counter, "history_reads", "Reads of a channel's history.", hub.history_reads),
        (counter, "history_read_failures", "Those that the broker did not answer.", hub.history_failures),
        (counter, "requests_accepted", "Requests of clients, stored for a worker.", gate.accepted),
        (counter, "requests_refused", "Requests of clients, refused.", gate.refused, "code", refused),
        (counter, "requests_answered", "Requests of clients whose answer began.", gate.answered),
        (counter, "requests_timed_out", "Requests of clients that no worker answered: 504.", gate.timed_out),
    ]


def _family(kind: Any, name: str, about: str, value: Any, label: str = "", known: Iterable[object] = ()) -> Metric:
    """Make a metric of one number; or, with a label, of each that `value` maps to, and 0 for those of `known` that
    never came: what is absent raises no alarm.
    """
    if not label:
        return kind(f"pubsub_{name}", about, value)  # type: ignore[no-any-return]
    family = kind(f"pubsub_{name}", about, labels=[label])
    for key in dict.fromkeys([*known, *value]):
        family.add_metric(["client" if key is None else str(key).lower()], value.get(key, 0))
    return family  # type: ignore[no-any-return]
