"""How long a store is waited for: one budget for an operation, whatever has to be tried again within it.

A failure that may pass (a broken connection, a 500, a 503, SlowDown) is tried again after a random, growing pause
until the budget is used up; one that will not (no such object, no permission, a refused condition, a bad request) is
an answer. The libraries below must not retry by themselves: stacked, their attempts multiply.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable
from typing import Any

from tenacity import AsyncRetrying, Retrying, retry_if_exception, stop_before_delay, wait_random_exponential

from anytimed.urls import BadAnswer

_ANSWERS = frozenset(
    {errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENAMETOOLONG, errno.EMSGSIZE, errno.ENOTEMPTY}
)
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 5.0


def passes(error: BaseException) -> bool:
    """Whether trying again may help."""
    if isinstance(error, FileNotFoundError | FileExistsError | PermissionError | NotADirectoryError | BadAnswer):
        return False
    if isinstance(error, OSError):
        return error.errno not in _ANSWERS
    status = getattr(error, "status", None)  # of aiohttp's and Google's errors
    if isinstance(status, int) and 400 <= status < 500:
        return status in (408, 429)
    # botocore, aiohttp and google have families of their own for a connection that broke; a TypeError is our mistake.
    return isinstance(error, Exception) and not isinstance(error, TypeError | ValueError | ImportError)


def patiently(attempt: Callable[[], Any], budget_s: float) -> Any:
    """The result of `attempt`, repeated while its failure may pass and `budget_s` lasts. Raises its last failure."""
    return Retrying(**_policy(budget_s))(attempt)


async def patiently_async(attempt: Callable[[], Awaitable[Any]], budget_s: float) -> Any:
    """The same for a coroutine function."""
    return await AsyncRetrying(**_policy(budget_s))(attempt)


def _policy(budget_s: float) -> dict[str, Any]:
    return {
        "stop": stop_before_delay(budget_s),
        "wait": wait_random_exponential(multiplier=_FIRST_PAUSE_S, max=_LONGEST_PAUSE_S),
        "retry": retry_if_exception(passes),
        "reraise": True,
    }
