"""Faults of the servers: API, dispatcher, Redis, PostgreSQL and the messages between them."""

import time
from collections.abc import Sequence

from celery import Celery

from halfstep.service.queue import RUN_JOB, make_celery
from tests.faults.injecting import Fault, Injecting, newest


class ServerFaults(Injecting):
    """They hit whoever works at the moment; no job is chosen."""

    def kill_api(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.kill("api")

    def kill_api_before_a_commit(self, fault: Fault) -> None:
        self.arm(fault, "submit.before_commit", times=self.draw.randint(1, 2))

    def kill_api_after_a_commit(self, fault: Fault) -> None:
        self.arm(fault, "submit.after_commit", times=self.draw.randint(1, 2))

    def kill_api_after_a_wake_up(self, fault: Fault) -> None:
        self.arm(fault, "submit.after_enqueue", times=self.draw.randint(1, 2))

    def kill_dispatcher(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.kill("dispatch")

    def flush_redis(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.redis.client.flushall()

    def restart_redis(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        self.installation.redis.kill()
        time.sleep(self.draw.uniform(0.0, 2.0))
        self.installation.redis.start()

    def redis_away(self, fault: Fault) -> None:
        self._proxied(fault, "refuse", redis=True)

    def redis_away_for_a_minute(self, fault: Fault) -> None:
        self._proxied(fault, "refuse", redis=True, seconds=60.0)

    def redis_silent(self, fault: Fault) -> None:
        self._proxied(fault, "silent", redis=True)

    def redis_slow(self, fault: Fault) -> None:
        self._proxied(fault, "slow", redis=True)

    def postgres_silent(self, fault: Fault) -> None:
        self._proxied(fault, "silent", redis=False)

    def postgres_slow(self, fault: Fault) -> None:
        self._proxied(fault, "slow", redis=False)

    def postgres_cut(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        if self.installation.postgres_proxy is not None:
            self.installation.postgres_proxy.cut()

    def postgres_crash(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        if self.installation.postgres is not None:
            self.installation.postgres.stop("immediate")
            time.sleep(self.draw.uniform(0.0, 1.5))
            self.installation.postgres.start()

    def _proxied(self, fault: Fault, mode: str, *, redis: bool, seconds: float | None = None) -> None:
        self.somebody_runs(fault)
        proxy = self.installation.redis_proxy if redis else self.installation.postgres_proxy
        if proxy is None:
            return
        proxy.mode = mode
        if mode == "refuse":
            proxy.cut()
        time.sleep(self.draw.uniform(0.5, 4.0) if seconds is None else seconds)
        proxy.mode = "pass"

    def duplicate_messages(self, fault: Fault) -> None:
        """Wake-ups for jobs that wait, run or pause, each more than once."""
        self.somebody_runs(fault)
        self._send([job.id for job in self.installation.look(newest) if not job.state.is_terminal] * 2)

    def stale_messages(self, fault: Fault) -> None:
        """Wake-ups for jobs that have ended, and for one that never was."""
        self.somebody_runs(fault)
        ended = [job.id for job in self.installation.look(newest) if job.state.is_terminal]
        self._send([*ended[:5], "00000000-0000-0000-0000-000000000000"])

    def strange_messages(self, fault: Fault) -> None:
        """Tasks whose arguments are no job's id, and one of another name."""
        self.somebody_runs(fault)
        self._send(["no-such-job", None, 7, {"a": [1]}])
        with self._celery() as celery:
            celery.send_task(RUN_JOB, args=[], kwargs={"other": True}, queue="halfstep", retry=False)
            celery.send_task("another.task", args=[], queue="halfstep", retry=False)

    def _send(self, arguments: Sequence[object]) -> None:
        with self._celery() as celery:
            for argument in arguments:
                celery.send_task(RUN_JOB, args=[argument], queue="halfstep", retry=False)

    def _celery(self) -> Celery:
        return make_celery(f"redis://127.0.0.1:{self.installation.redis.port}/0", publisher=True)

    def garbage_on_the_queue(self, fault: Fault) -> None:
        self.somebody_runs(fault)
        for garbage in (
            b"\xff\x00garbage",
            b"{}",
            b'{"body": "!", "headers": {}, "properties": {}}',
            b"[1, 2]",
        ):
            self.installation.redis.client.lpush("halfstep", garbage)
