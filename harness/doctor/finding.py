"""What an examination found: a line for people, a record for machines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from harness.dist import World

__all__ = ["Finding", "Probe", "Site", "Verdict", "ranks_text", "worst"]

Verdict = Literal["ok", "warn", "fail"]
_ORDER: tuple[Verdict, ...] = ("ok", "warn", "fail")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    value: str
    verdict: Verdict = "ok"
    remedy: str = ""
    """What to do about it; empty where all is well."""
    by_rank: Sequence[Any] = ()
    """What each rank measured, where that is a number or a text; empty: it is no rank's own."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where the examination takes place."""

    world: World
    runs_dir: Path
    """Where runs will be kept; it need not exist."""


class Probe(NamedTuple):
    """One kind of examination: every rank measures, then what all of them measured is judged."""

    what: str
    measure: Callable[[Site], Any]
    """On every rank by itself; the result has to be picklable, but for one that `measure_collectively` takes.
    OSError and RuntimeError are findings."""
    judge: Callable[[Sequence[Any]], list[Finding]]
    """Of the measurements by rank."""
    measure_collectively: Callable[[Site, Any], Any] | None = None
    """What takes collectives, once no rank has failed alone: made of what `measure` gave on this rank, and
    judged in its place."""


def worst(findings: Sequence[Finding]) -> Verdict:
    """The verdict on everything."""
    return max((finding.verdict for finding in findings), key=_ORDER.index, default="ok")


def ranks_text(values: Mapping[int, object]) -> str:
    """`{0: "a", 1: "a", 2: "b"}` as `a on ranks 0, 1; b on rank 2`."""
    ranks: dict[object, list[int]] = {}
    for rank, value in values.items():
        ranks.setdefault(value, []).append(rank)
    return "; ".join(
        f"{value} on rank{'s' if len(who) > 1 else ''} {', '.join(map(str, who))}"
        for value, who in ranks.items()
    )
