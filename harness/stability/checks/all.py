"""The checks of a guard: the bundled ones, and those of a user's own by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace

from torch import nn

from harness.config import GuardConfig
from harness.errors import ConfigError
from harness.records import Finding
from harness.stability.audits.all import AuditsCheck
from harness.stability.audits.forward import ForwardWatch
from harness.stability.before import UPDATE, WEIGHTS
from harness.stability.checks.attention import AttentionCheck
from harness.stability.checks.base import Arrived, Check, Reading, StepView
from harness.stability.checks.cadence import is_look
from harness.stability.checks.constants import ConstantsCheck
from harness.stability.checks.inputs import InputsCheck
from harness.stability.checks.movement import MovementCheck
from harness.stability.checks.precision import PrecisionCheck
from harness.stability.checks.replicas import ReplicaCheck
from harness.stability.checks.rows import RowsCheck
from harness.stability.checks.samples import SamplesCheck
from harness.stability.checks.scale import ScaleCheck
from harness.stability.checks.state import StateCheck
from harness.stability.checks.targets import TargetsCheck
from harness.stability.optimizers import Optimizers
from harness.stability.packing import Packet
from harness.user_code import load_function, made_by_user, user_code

__all__ = ["Checks", "load_checks"]

logger = logging.getLogger(__name__)

MAX_FINDINGS = 4
"""That one check says in a run."""

BUNDLED: tuple[Callable[[GuardConfig], Check], ...] = (
    RowsCheck,
    AttentionCheck,
    ReplicaCheck,
    SamplesCheck,
    MovementCheck,
    StateCheck,
    ConstantsCheck,
    PrecisionCheck,
    ScaleCheck,
)

OF_FORWARD: tuple[Callable[[GuardConfig, ForwardWatch], Check], ...] = (
    AuditsCheck,
    InputsCheck,
    TargetsCheck,
)
"""Those that look at forward passes, through one hook."""


class Checks:
    """All of them as one.

    Args:
        users: Those of a user, whose errors are made `TaskError`s.

    Raises:
        ConfigError: two have one name, or one is no `Check`.
    """

    def __init__(self, config: GuardConfig, users: Sequence[Check] = ()) -> None:
        self._checks: dict[str, Check] = {}
        self._users = {id(check) for check in users}
        self._said: dict[str, dict[tuple[int | None, str | None, str], int]] = {}
        """By check, what was found, by rank, parameter and remedy, and in which step it was said."""
        self._forward = ForwardWatch() if config.silent_errors == "on" else None
        self._has_said_unseen = self._forward is None
        of_forward = [make(config, self._forward or ForwardWatch()) for make in OF_FORWARD]
        for check in (*(make(config) for make in BUNDLED), *of_forward, *users):
            if check.name in self._checks or check.name in ("rank_statistics", "summary", UPDATE, WEIGHTS):
                raise ConfigError(f"two checks are called {check.name!r}", rule="each has a name of its own")
            self._checks[check.name] = check

    @contextmanager
    def watch_forward(self, step: int) -> Iterator[None]:
        """Around a forward pass of `step`."""
        with ExitStack() as stack:
            for check in self._checks.values():
                if check.is_due(step):
                    stack.enter_context(check.watch_forward())
            yield

    def attach(self, model: nn.Module, optimizers: Optimizers) -> None:
        """Once, when the guard is made."""
        if self._forward is not None:
            self._forward.attach(model)
        for check in self._checks.values():
            with self._code_of(check, "attach"):
                check.attach(model, optimizers)

    def watch_evaluation(self) -> AbstractContextManager[None]:
        """Around an evaluation."""
        audits = self._checks[AuditsCheck.name]
        assert isinstance(audits, AuditsCheck)
        return audits.watch_evaluation()

    def watches(self, step: int) -> bool:
        """Whether any check is due, so that a view of the step is worth making."""
        return any(
            check.every_step or check.is_due(step) or check.is_measured(step)
            for check in self._checks.values()
        )

    def measure(self, view: StepView) -> tuple[Packet, Packet]:
        """What is measured in the step: what all ranks send, and what is the same on all replicas."""
        sent: Packet = {}
        same: Packet = {}
        for name, check in self._checks.items():
            if not check.is_measured(view.step):
                continue
            with self._code_of(check, "measure"):
                numbers = check.measure(view)
                if numbers is not None:
                    numbers = numbers.double() if numbers.is_floating_point() else numbers.long()
                    (same if check.same_on_replicas else sent)[name] = numbers
        return sent, same

    def observe(self, view: StepView) -> None:
        """In every step, before anything is measured."""
        for check in self._checks.values():
            if check.every_step:
                with self._code_of(check, "observe"):
                    check.observe(view)

    def after_update(self, view: StepView) -> None:
        """In every step, after the optimizer's."""
        for check in self._checks.values():
            if check.every_step:
                with self._code_of(check, "after_update"):
                    check.after_update(view)
        if self._forward is not None:
            self._forward.clear()
        if not self._has_said_unseen and view.step > 0 and is_look(view.step):
            self._say_unseen(view)

    def before_update(self, view: StepView) -> None:
        """Just before the optimizer's step."""
        for check in self._checks.values():
            if check.is_due(view.step):
                with self._code_of(check, "before_update"):
                    check.before_update(view)

    def read(self, packet: Packet, arrived: Arrived) -> list[Reading]:
        """What the numbers in `packet`, on the host, mean."""
        readings = []
        for name, check in self._checks.items():
            if name in packet:
                with self._code_of(check, "read"):
                    reading = check.read(packet[name], arrived)
                readings.append(replace(reading, findings=self._unsaid(reading.findings, arrived.step)))
        return readings

    def forget(self) -> None:
        """The run goes on from another state."""
        if self._forward is not None:
            self._forward.clear()
        for check in self._checks.values():
            check.forget()

    def close(self) -> None:
        """Takes out what checks have hung on the model."""
        if self._forward is not None:
            self._forward.close()
        for check in self._checks.values():
            check.close()

    def _say_unseen(self, view: StepView) -> None:
        """Says once, after the first steps, what cannot be seen in this loop."""
        self._has_said_unseen = True
        blind = [what for check in self._checks.values() for what in check.unseen(view)]
        if blind:
            logger.info("checks for silent errors that see nothing in this loop: %s", "; ".join(blind))

    def _unsaid(self, findings: Sequence[Finding], step: int) -> list[Finding]:
        """Those that were not said at an earlier step; a record may be made twice."""
        new = []
        for one in findings:
            said = self._said.setdefault(one.check, {})
            # The remedy tells two kinds of problem apart: words of a problem have numbers of the step.
            if (
                said.setdefault((one.rank, one.parameter, one.remedy), step) == step
                and len(said) <= MAX_FINDINGS
            ):
                new.append(one)
        return new

    def _code_of(self, check: Check, method: str) -> AbstractContextManager[None]:
        if id(check) not in self._users:
            return nullcontext()
        return user_code(f"the check {check.name}.{method}", rule="what a check raises ends the run")


def load_checks(config: GuardConfig) -> list[Check]:
    """Those that `config.checks` names.

    Raises:
        ConfigError: one cannot be found, or is no `Check`.
        TaskError: its code raised something.
    """
    return [_loaded(spec, config) for spec in config.checks]


def _loaded(spec: str, config: GuardConfig) -> Check:
    make = load_function(spec, key="guard.checks")
    rule = "it is a subclass of harness.stability.Check, or a function (GuardConfig) that returns one"
    return made_by_user(f"check {spec!r}", make, config, kind=Check, rule=rule)  # type: ignore[type-abstract]
