"""The wall clock's part: commits, their verification, exports, discovery and retention by interval or cron.

APScheduler runs the jobs in a thread of its own; a job only posts a request, so a slow loop is asked once, not many
times (`coalesce`), and nothing that happens here changes the numbers of the training.

Clocks get set. Forward: `Every` makes up for nothing, where APScheduler's own interval would count every time that was
missed. Backward: its jobs would wait until the clock shows again what it showed before, hours later; so a second thread
looks once a second whether anything is due later than it could be from now, brings it forward, and has the scheduler
count anew how long to sleep."""

from __future__ import annotations

import contextlib
import threading
from datetime import datetime, timedelta

from apscheduler.jobstores.base import JobLookupError
from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger

from anytimed.config import Config, Schedule
from anytimed.contracts import ConfigError
from anytimed.service.requests import Commit, Discover, Export, Mailbox, Request, Retain, Verify

RETAIN = Schedule(every_s=600.0)
LOOK_S = 1.0


class Every(BaseTrigger):  # type: ignore[misc]  # APScheduler has no types
    """After an interval in seconds, over and over."""

    def __init__(self, seconds: float) -> None:
        self._interval = timedelta(seconds=seconds)

    def get_next_fire_time(self, previous: datetime | None, now: datetime) -> datetime:
        """One interval after the last time, or after now where that is past already."""
        following = (previous or now) + self._interval
        return following if following > now else now + self._interval


def trigger(schedule: Schedule, where: str) -> BaseTrigger | None:
    """APScheduler's trigger for a schedule; None where it has no clock. Raises ConfigError on a bad cron line."""
    if schedule.cron is not None:
        try:
            return CronTrigger.from_crontab(schedule.cron)
        except ValueError as error:
            raise ConfigError(
                f'{where} cron: found "{schedule.cron}", allowed: five cron fields, as in "0 * * * *" ({error})'
            ) from None
    return Every(schedule.every_s) if schedule.every_s is not None else None


def plan(config: Config) -> dict[str, tuple[Request, BaseTrigger | None]]:
    """What is posted when. Raises ConfigError on a bad cron line."""
    file, verify_every_s = str(config.path), config.commits.verify_every_s
    return {
        "commit": (Commit(), trigger(config.commits, f"{file}: [commits]")),
        "export": (Export(), trigger(config.exports, f"{file}: [exports]")),
        "discover": (Discover(), trigger(config.data.discover, f"{file}: [data.discover]")),
        "retain": (Retain(), trigger(RETAIN, "")),
        "verify": (Verify(), Every(max(verify_every_s, 0.001)) if verify_every_s else None),
    }


class Timetable:
    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._scheduler = BackgroundScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._look, name="timetable", daemon=True)

    def apply(self, config: Config) -> None:
        """Replace the plan by that of `config`."""
        jobs = plan(config)
        self._scheduler.remove_all_jobs()
        for name, (request, when) in jobs.items():
            if when is not None:
                self._scheduler.add_job(self._mailbox.post, when, args=[request], id=name)

    def start(self) -> None:
        self._scheduler.start()
        self._watch.start()

    def close(self) -> None:
        self._closed.set()
        self._scheduler.shutdown(wait=False)

    def _look(self) -> None:
        """Bring forward what a clock that was set back has put off."""
        while not self._closed.wait(LOOK_S):
            now = datetime.now(self._scheduler.timezone)
            for job in self._scheduler.get_jobs():
                soonest = job.trigger.get_next_fire_time(None, now)
                if job.next_run_time is not None and soonest is not None and job.next_run_time > soonest:
                    with contextlib.suppress(JobLookupError):  # a reload has replaced it meanwhile
                        job.modify(next_run_time=soonest)
            self._scheduler.wakeup()
