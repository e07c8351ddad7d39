# SPDX-License-Identifier: GPL-2.0-or-later
"""A change of knobs that a person asks for: checked against the configuration, planned, and described."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from ksmd_ctl.config.model import STEERED, Config
from ksmd_ctl.errors import Cancelled, KsmdError, Refused, UsageError, did_you_mean
from ksmd_ctl.host.interface import Host
from ksmd_ctl.host.knobs import KNOBS, Knob, KnobValue, parse_wanted, takes_text
from ksmd_ctl.host.memory import Inventory
from ksmd_ctl.host.operation import Operation, Steps, Timer, waited
from ksmd_ctl.host.sample import Sample
from ksmd_ctl.transactions.plan import (
    ASSUMED_RATES,
    Limits,
    Plan,
    UnmergeRates,
    limits_of,
    make_plan,
    need_room,
    needs_unmerge,
    room_document,
)

FORMAT: Final = 1
_WHAT: Final = "reading the change"
# Between two plans of a change that waits for room.
_WAIT_STEP_SECONDS: Final = 2.0


def parse_assignments(words: Iterable[str]) -> dict[Knob, KnobValue]:
    """The knobs in words of the form ``KNOB=VALUE``.

    :raises UsageError: a word is of another form, names a knob twice, or asks for what the knob doesn't take
    """
    wanted: dict[Knob, KnobValue] = {}
    for word in words:
        name, separator, value = word.partition("=")
        if not separator:
            raise UsageError(_WHAT, f"{word!r} is not KNOB=VALUE", hint="as in merge_across_nodes=0")
        if name not in KNOBS:
            why = f"there is no knob {name!r}{did_you_mean(name, KNOBS)}"
            raise UsageError(_WHAT, why, hint=f"there are {', '.join(Knob)}")
        knob = Knob(name)
        if knob in wanted:
            raise UsageError(_WHAT, f"{knob} is given twice")
        try:
            wanted[knob] = parse_wanted(knob, value)
        except ValueError as error:
            raise UsageError(_WHAT, f"{knob}: {error}", hint=f"{knob} takes {takes_text(knob)}") from error
    if not wanted:
        raise UsageError(_WHAT, "it names no knob", hint="as in merge_across_nodes=0")
    return wanted


def parse_wanted_knobs(knobs: Mapping[str, object]) -> dict[Knob, KnobValue]:
    """The knobs in an object of names and values, as it comes over the control socket.

    :raises UsageError: as `parse_assignments`
    """
    return parse_assignments(
        f"{name}={int(value) if isinstance(value, bool) else value}" for name, value in knobs.items()
    )


def check_declared(config: Config, wanted: Mapping[Knob, KnobValue]) -> None:
    """Refuse a change that the service would take back at its next tick.

    :raises Refused: the configuration declares another value
    """
    if not config.policy.writes:
        return
    for knob, value in wanted.items():
        if config.policy.steers and knob in STEERED:
            raise Refused(
                f"setting {knob} to {value}",
                f'it is reserved under policy = "{config.policy}"',
                hint='set policy = "fixed" and the knob in the configuration, and reload',
            )
        if config.holds_zero_pages and knob is Knob.USE_ZERO_PAGES and value != 1:
            raise Refused(
                f"setting {knob} to {value}",
                f'the service holds it at 1 under policy = "{config.policy}" ([healing] zero_pages)',
                hint="declare use_zero_pages under [knobs], or set healing.zero_pages = false, and reload the service",
            )
        if config.chooses_scheduling and knob is Knob.KSMD_SCHEDULING:
            raise Refused(
                f"setting {knob} to {value}",
                f'it is chosen under policy = "{config.policy}"',
                hint="set scheduling under [ksmd], and reload the service",
            )
        declared = config.knobs.get(knob)
        if declared is not None and declared.value != value:
            raise Refused(
                f"setting {knob} to {value}",
                f"the configuration declares {declared.value} ({declared.origin}), and the service would put that back",
                hint="change it there and reload; for merge_across_nodes and max_page_sharing then set it here, too",
            )


def planning(
    host: Host,
    wanted: Mapping[Knob, KnobValue],
    limits: Limits,
    config: Config,
    rates: UnmergeRates = ASSUMED_RATES,
    look: Callable[[int], Operation[Inventory]] | None = None,
) -> Operation[Plan]:
    """Find out what a change would do, whether it fits or not: an operation, as it may have to look at every process.

    :param look: gives the inventory, by what has to stay free; None: `Host.inventory`
    :raises KsmdError: by the operation: the processes could not be looked at, or this host lacks a knob
    """
    declared = config.knobs.get(Knob.RUN) if config.policy.writes else None
    run_after = None if declared is None else int(declared.value)
    before = host.sample()
    looking = (look or host.inventory)(limits.floor_bytes) if needs_unmerge(wanted, before) else None

    def steps() -> Steps[Plan]:
        inventory = None if looking is None else (yield from waited(looking))
        sample = host.sample()
        if inventory is None and needs_unmerge(wanted, sample):
            raise Refused("planning the change", "something was merged just now", hint="try again")
        return make_plan(
            wanted,
            sample,
            inventory,
            limits,
            run_after=run_after,
            rates=rates,
            before=before,
        )

    return Operation(steps())


def fitting_plan(
    host: Host,
    wanted: Mapping[Knob, KnobValue],
    config: Callable[[], Config],
    rates: UnmergeRates = ASSUMED_RATES,
    wait_seconds: float = 0.0,
    *,
    force: bool = False,
) -> Operation[Plan]:
    """Plan a change until there is room for it, and tasks do not wait for memory.

    :param config: gives the current configuration
    :param wait_seconds: how long to wait for that at most
    :param force: too little room is no reason to wait
    :raises Refused: by the operation: there is no room, with the figures, or it was cancelled
    :raises KsmdError: by the operation: as `planning`
    """

    def steps() -> Steps[Plan]:
        first = host.sample(fresh=True)
        until = first.time_seconds + wait_seconds
        while not operation.cancelled:
            try:
                plan = yield from waited(planning(host, wanted, limits_of(config()), config(), rates))
            except Cancelled:
                break
            second = host.sample(fresh=True)
            busy = too_busy(plan, limits_of(config()), first, second, force=force)
            if busy is None:
                return plan
            if second.time_seconds >= until:
                raise busy
            first = second
            yield Timer(host.clock, min(_WAIT_STEP_SECONDS, until - second.time_seconds))
        raise Refused("changing the knobs", "interrupted before anything was changed")

    operation = Operation(steps())
    return operation


def too_busy(plan: Plan, limits: Limits, first: Sample, second: Sample, *, force: bool = False) -> KsmdError | None:
    """Why a plan can't be carried out now; None where it can.

    :param first: with `second`, two samples some time apart, for memory pressure
    :param force: too little room is no reason
    """
    try:
        if not force:
            need_room(plan, limits.floor_bytes)
    except KsmdError as error:
        return error
    before, after = first.number("pressure_some_seconds"), second.number("pressure_some_seconds")
    seconds = second.time_seconds - first.time_seconds
    if plan.unmerge and before is not None and after is not None and seconds > 0:
        share = (after - before) / seconds
        if share > limits.max_pressure:
            why = (
                f"tasks wait for memory {share:.0%} of the time, and [limits] max_pressure is {limits.max_pressure:.0%}"
            )
            return Refused("un-merging everything", why, hint="--wait SECONDS waits until that has passed")
    return None


def steps_of(plan: Plan) -> tuple[str, ...]:
    """What would be done, in order, in words."""
    if not plan.unmerge:
        return tuple(f"write {write.knob} = {write.value} and read it back" for write in plan.writes)
    steps = ["stop ksmd (run = 0)"]
    if plan.at_once:
        steps.append(
            f"un-merge {plan.merged_pages:,} pages of {plan.processes} processes with run = 2: there is one node, room "
            "everywhere, and no process has so many that it would stop for long"
        )
    else:
        if plan.batches:
            pages = sum(batch.pages for batch in plan.batches) - plan.read_only_pages
            steps.append(
                f"un-merge {pages:,} pages of {plan.processes} processes page by page, each onto its home "
                "node; check room and pressure in between"
            )
        rest = "check whether what is left fits, and un-merge it (run = 2, spread over all nodes)"
        if plan.read_only_pages:
            rest += f"; {plan.read_only_pages:,} pages lie in mappings that are not writable"
        elif plan.one_tree:
            rest += "; if nothing is left, let ksmd scan one page instead of writing run = 2"
        steps.append(rest)
    steps += [f"write {write.knob} = {write.value} and read it back" for write in plan.writes if write.value != 2]
    if plan.nodes != 1:
        steps.append("move home what is on another node")
    words = {0: "leave ksmd stopped", 1: "have ksmd merge again", 2: "leave everything un-merged"}
    steps.append(f"{words[plan.run_after]} (run = {plan.run_after})")
    return tuple(steps)


def plan_document(plan: Plan, limits: Limits, page_size: int) -> dict[str, object]:
    """The JSON document of a plan (docs/json.md)."""
    there, total = plan.at_home
    return {
        "format": FORMAT,
        "knobs": {write.knob.value: {"from": plan.found[write.knob], "to": write.value} for write in plan.writes},
        "run": {"from": plan.found[Knob.RUN], "to": plan.run_after},
        "unmerge": plan.unmerge,
        "at_once": plan.at_once,
        "fits": plan.fits,
        "steps": list(steps_of(plan)),
        "pages": {
            "merged": plan.merged_pages,
            "processes": plan.processes,
            "at_home": there,
            "with_home": total,
            "read_only": plan.read_only_pages,
            "homeless": plan.homeless_pages,
            "leave_home_by_plain_run_2": plan.leave_pages,
            "size_bytes": page_size,
        },
        "room": room_document(plan.demands),
        "floor_bytes": limits.floor_bytes,
        "skipped": dict(plan.skipped),
        "seconds": plan.seconds,
        "sparse_seconds": plan.sparse_seconds,
        "remerge_seconds": plan.remerge_seconds,
    }
