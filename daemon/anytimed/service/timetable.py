"""The wall clock's part: commits, their verification, exports, discovery and retention by interval or cron.

APScheduler runs the jobs in a thread of its own; a job only posts a request, so a slow loop is asked once, not many
times (`coalesce`), and nothing that happens here changes the numbers of the training."""

from __future__ import annotations

from apscheduler.schedulers.background import BackgroundScheduler
from apscheduler.triggers.base import BaseTrigger
from apscheduler.triggers.cron import CronTrigger
from apscheduler.triggers.interval import IntervalTrigger

from anytimed.config import Config, Schedule
from anytimed.contracts import ConfigError
from anytimed.service.requests import Commit, Discover, Export, Mailbox, Request, Retain, Verify

RETAIN = Schedule(every_s=600.0)


def trigger(schedule: Schedule, where: str) -> BaseTrigger | None:
    """APScheduler's trigger for a schedule; None where it has no clock. Raises ConfigError on a bad cron line."""
    if schedule.cron is not None:
        try:
            return CronTrigger.from_crontab(schedule.cron)
        except ValueError as error:
            raise ConfigError(
                f'{where} cron: found "{schedule.cron}", allowed: five cron fields, as in "0 * * * *" ({error})'
            ) from None
    return IntervalTrigger(seconds=schedule.every_s) if schedule.every_s is not None else None


def plan(config: Config) -> dict[str, tuple[Request, BaseTrigger | None]]:
    """What is posted when. Raises ConfigError on a bad cron line."""
    file = str(config.path)
    return {
        "commit": (Commit(), trigger(config.commits, f"{file}: [commits]")),
        "export": (Export(), trigger(config.exports, f"{file}: [exports]")),
        "discover": (Discover(), trigger(config.data.discover, f"{file}: [data.discover]")),
        "retain": (Retain(), trigger(RETAIN, "")),
        "verify": (Verify(), trigger(Schedule(every_s=config.commits.verify_every_s or None), "")),
    }


class Timetable:
    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._scheduler = BackgroundScheduler(
            job_defaults={"coalesce": True, "max_instances": 1, "misfire_grace_time": None}
        )

    def apply(self, config: Config) -> None:
        """Replace the plan by that of `config`."""
        jobs = plan(config)
        self._scheduler.remove_all_jobs()
        for name, (request, when) in jobs.items():
            if when is not None:
                self._scheduler.add_job(self._mailbox.post, when, args=[request], id=name)

    def start(self) -> None:
        self._scheduler.start()

    def close(self) -> None:
        self._scheduler.shutdown(wait=False)
