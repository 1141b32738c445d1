"""The queue: a Celery app over Redis or Valkey whose messages are wake-ups that carry a job id.

The SQL row is the truth, so a lost, late or repeated message is harmless; nothing here may block a
request for longer than half a second. The only Celery file on the service's side.
"""

import functools
import threading
import time
import uuid
from collections.abc import Sequence
from queue import Empty

import kombu.transport.redis
import structlog
from celery import Celery
from kombu.exceptions import BatchPublishError, OperationalError

from halfstep.service.settings import Settings

QUEUE = "halfstep"
RUN_JOB = "halfstep.run_job"
PUBLISH_TIMEOUT_SECONDS = 0.5
# After a failure the broker is left alone for this long: the dispatcher sends again whatever was missed.
BACKOFF_SECONDS = 3.0

log = structlog.get_logger(__name__)
_BROKER_ERRORS = (
    OperationalError,
    BatchPublishError,
    OSError,
    *kombu.transport.redis.Transport.connection_errors,
    *kombu.transport.redis.Transport.channel_errors,
)


class _Channel(kombu.transport.redis.Channel):
    """Drops what is no message. kombu raises it into Celery's consumer, which ends the worker."""

    def _brpop_read(self, **options: object) -> object:
        try:
            return super()._brpop_read(**options)  # type: ignore[no-untyped-call]  # kombu has no annotations
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("unreadable message on the queue; it is dropped", error=repr(error))
            raise Empty from None


class Transport(kombu.transport.redis.Transport):
    """kombu's Redis transport with the channel above."""

    Channel = _Channel


kombu.transport.TRANSPORT_ALIASES |= dict.fromkeys(("redis", "rediss"), f"{__name__}:Transport")


def make_celery(broker_url: str, *, publisher: bool = False) -> Celery:
    """A Celery app for `broker_url`; `publisher` bounds each socket wait to half a second."""
    app = Celery("halfstep", broker=broker_url, set_as_current=False)
    transport: dict[str, object] = {
        # Messages are acknowledged on receipt, so nothing is ever re-delivered by the broker's clock.
        "visibility_timeout": 7 * 86400,
        "socket_keepalive": not broker_url.startswith("redis+socket"),
    }
    if publisher:
        transport |= {
            "socket_timeout": PUBLISH_TIMEOUT_SECONDS,
            "socket_connect_timeout": PUBLISH_TIMEOUT_SECONDS,
            "retry_on_timeout": False,
            "max_retries": 0,  # one attempt: the dispatcher is the retry
        }
    app.conf.update(
        task_default_queue=QUEUE,
        task_serializer="json",
        result_serializer="json",
        accept_content=["json"],
        task_ignore_result=True,
        task_acks_late=False,
        worker_prefetch_multiplier=1,
        worker_disable_prefetch=True,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_enable_remote_control=False,
        worker_send_task_events=False,
        broker_connection_retry_on_startup=True,
        broker_connection_max_retries=None,
        broker_transport_options=transport,
        broker_connection_timeout=PUBLISH_TIMEOUT_SECONDS if publisher else 4.0,
    )
    return app


class _Publisher:
    """One broker's publishing side: thread-safe, and silent for a while after a failure."""

    def __init__(self, broker_url: str) -> None:
        self._app = make_celery(broker_url, publisher=True)
        self._lock = threading.Lock()
        self._silent_until = 0.0

    def send(self, job_ids: Sequence[str]) -> bool:
        if time.monotonic() < self._silent_until:
            return False
        try:
            self._publish(job_ids)
        except _BROKER_ERRORS as error:
            with self._lock:
                first = time.monotonic() >= self._silent_until
                self._silent_until = time.monotonic() + BACKOFF_SECONDS
            if first:
                log.warning("broker unreachable; queued jobs wait for the dispatcher", error=str(error))
            return False
        return True

    def _publish(self, job_ids: Sequence[str]) -> None:
        # As Celery's `send_task` does, without the results and routes that it makes for each: half the work.
        amqp = self._app.amqp
        # One round trip for all of them, at the end of the batch.
        with self._app.producer_or_acquire() as producer, producer.batch():
            for number, job_id in enumerate(job_ids):
                message = amqp.create_task_message(
                    str(uuid.uuid4()),
                    RUN_JOB,
                    args=[job_id],
                    argsrepr=repr([job_id]),
                    kwargsrepr="{}",
                    ignore_result=True,
                    reply_to=self._app.thread_oid,
                )
                amqp.send_task_message(
                    producer,
                    RUN_JOB,
                    message,
                    queue=QUEUE,
                    retry=False,
                    declare=None if number == 0 else [],  # with the first, for all
                )

    def reachable(self) -> bool:
        try:
            with self._app.connection_for_write() as connection:
                connection.default_channel.client.ping()
        except (OperationalError, OSError):
            return False
        return True


@functools.cache
def _publisher(broker_url: str) -> _Publisher:
    return _Publisher(broker_url)


def enqueue(settings: Settings, *job_ids: str) -> bool:
    """Wake a worker for each of these jobs. Call it after the commit.

    Returns:
        False when the broker did not take the messages within half a second; the jobs are stored all the
        same, and the dispatcher sends them again.
    """
    return _publisher(settings.celery_broker_url).send(job_ids)


def broker_reachable(settings: Settings) -> bool:
    """True when the broker answers a PING within about half a second."""
    return _publisher(settings.celery_broker_url).reachable()


def wake_worker(settings: Settings, *job_ids: str) -> None:
    """`enqueue` for a request that has committed: no failure here reaches the client."""
    try:
        sent = enqueue(settings, *job_ids)
    except Exception:  # whatever it is, the dispatcher sends what this could not
        log.exception("enqueue_failed", job_ids=job_ids)
    else:
        if not sent:
            log.warning("enqueue_failed", job_ids=job_ids, reason="the broker did not take the message")
