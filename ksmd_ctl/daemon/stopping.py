# SPDX-License-Identifier: GPL-2.0-or-later
"""Tells a stop from a restart, under systemd.

Both send SIGTERM, and nothing in a service's environment tells one from the other. systemd knows: `systemctl restart`
(and so an upgrade) runs a job of type ``restart`` that is still there while ``ExecStopPost=`` runs, `systemctl stop`
and a shutdown run a ``stop`` (systemd's job.c: a restart's job turns into a start only once the unit is down). So
what is to be done at a stop is done by ``ExecStopPost=``, which asks for the job, and waits, so that `systemctl stop`
returns only when the knobs are back. It runs as root: then `systemctl` reaches systemd without a D-Bus daemon, the
knobs can be written without the broker, which systemd would not start during a shutdown, and it works after a crash.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["final_stop", "job_type", "list_jobs"]

_RESTARTS: Final = ("restart", "try-restart", "reload-or-start", "start", "verify-active")
_TIMEOUT_SECONDS: Final = 10


def final_stop(
    unit: str, environment: Mapping[str, str] = os.environ, jobs: Callable[[], str | None] | None = None
) -> bool:
    """Whether a unit whose ``ExecStopPost=`` this runs in is stopped, and not to be started again.

    :param jobs: what `systemctl list-jobs` prints, None where it can't be had
    """
    listing = (jobs or list_jobs)()
    if listing is None:
        # Putting back what a restart sets again costs a moment; not putting back would last.
        return True
    job = job_type(listing, unit)
    if job is not None:
        return job not in _RESTARTS
    # Nobody asked systemd: it ended by itself. Restart=on-failure starts it again unless all was well.
    return environment.get("SERVICE_RESULT", "success") == "success"


def job_type(listing: str, unit: str) -> str | None:
    """The type of a unit's job in a list of jobs (ID UNIT TYPE STATE), None where it has none."""
    for line in listing.splitlines():
        words = line.split()
        if len(words) == 4 and words[1] == unit:
            return words[2]
    return None


def list_jobs() -> str | None:
    """The jobs that systemd has now; None where it can't be asked."""
    try:
        result = subprocess.run(
            ["systemctl", "list-jobs", "--no-legend", "--no-pager", "--plain", "--full"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C.UTF-8", "SYSTEMD_COLORS": "0"},
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    # "No jobs running." is no line of the table.
    return result.stdout
