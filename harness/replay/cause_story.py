"""What was found out about a cause, in words and as plain data."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from harness.replay.arms import Arm
from harness.replay.cause import Cause
from harness.replay.judgement import Judgement
from harness.replay.spike import Carriers
from harness.replay.trace import Operation, TensorNote

__all__ = ["carriers_data", "carriers_text", "cause_data", "cause_text", "judgement_text"]

SHOWN = 5
"""Propagators that the story lists."""

_KINDS = {
    "data": "the data",
    "model": "the model's code or its weights",
    "optimization": "the learning rate, or the optimizer",
    "precision": "the precision of the arithmetic",
    "kernel": "a kernel",
    "hardware": "the hardware",
    "state": "an earlier step, or what changed the state between two steps",
    "rehearsed": "a rehearsal",
    "unknown": "unknown",
}


def cause_text(cause: Cause) -> str:
    """A section of the story."""
    if cause.only_together:
        return (
            f"## Rank {cause.rank}\n\nEach of its micro-batches is finite by itself; only their sum is not:"
            " the accumulated gradient overflows."
        )
    parts = [f"## Rank {cause.rank}, micro-batch {cause.micro_batch}", _origin(cause), _propagation(cause)]
    parts += [_samples(cause), _sizes(cause)]
    return "\n\n".join(part for part in parts if part)


def _origin(cause: Cause) -> str:
    producer = cause.producer
    if producer is None:
        return "Traced operation by operation, nothing that is not finite was seen to reach loss or gradient."
    if isinstance(producer, str):
        return f"**It was there before the step began: {producer} is not finite.**"
    if producer.is_empty:
        return _unwritten(producer)
    of = "finite numbers"
    if producer.has_constant:
        of = "a constant"
    elif producer.nan_from or producer.inf_from:
        of = "an Inf that is usual there"
    where = f"in the {producer.direction} pass, in {module_text(producer)}"
    text = f"**It began {where}: `{producer.name}` made {producer.makes} of {of}.**"
    if producer.forward_name is not None:
        text += f" It is a part of the derivative of `{producer.forward_name}`."
    if producer.parameter is not None:
        text += f" It ran in a hook of the gradient of {producer.parameter}."
    if producer.place.file is not None:
        text += f"\n\n    {producer.place}\n        {producer.place.code}"
    notes = [f"- in: {note_text(note)}" for note in producer.inputs]
    return "\n".join([text, "", *notes, f"- out: {note_text(producer.output)}"])


def _unwritten(producer: Operation) -> str:
    text = (
        f"**It uses memory that nobody has written, in {module_text(producer)}**: `{producer.name}` handed it"
        " out as it was, and no operation wrote all of it. It may hold anything."
    )
    if producer.place.file is not None:
        text += f"\n\n    {producer.place}\n        {producer.place.code}"
    return text


def _propagation(cause: Cause) -> str:
    way = [one for one in cause.way[1:] if isinstance(one, Operation)]
    if not way:
        return ""
    shown = [f"`{one.name}` in {module_text(one)}" for one in way[:SHOWN]]
    more = f", and {len(way) - SHOWN} more" if len(way) > SHOWN else ""
    return f"Passed on by {', '.join(shown)}{more}; these are not to blame."


def _samples(cause: Cause) -> str:
    blame = cause.blame
    if blame is None:
        return ""
    runs = f" ({blame.num_runs} runs)"
    if blame.samples:
        shown = ", ".join(map(str, blame.samples))
        return f"**Samples to blame: {shown}.** {_sentence(blame.reason)}{runs}."
    if not blame.num_runs:
        return f"Whether the data is to blame is open: {blame.reason}."
    return f"**No subset of the data is to blame**: {blame.reason}{runs}."


def _sizes(cause: Cause) -> str:
    lines = []
    if cause.activations:
        shown = [
            f"{one.largest:.4g} in {one.module or 'the model'} (`{one.operation}`)"
            for one in cause.activations[:SHOWN]
        ]
        lines.append(f"Largest finite activations: {', '.join(shown)}.")
    if cause.attention_logits:
        logits = ", ".join(f"{one:.4g}" for one in cause.attention_logits)
        lines.append(f"Largest attention logits, call by call: {logits}.")
    return "\n\n".join(lines)


def judgement_text(judgement: Judgement, arms: Sequence[Arm]) -> str:
    """Whose fault it is, and what was tried."""
    head = f"## Whose fault\n\n**{_sentence(_KINDS[judgement.kind])}** ({judgement.sure}): {judgement.why}."
    if not arms:
        return head
    lines = ["| again, with | result |", "|---|---|"]
    for arm in arms:
        result = f"could not be run: {arm.problem}" if arm.is_bad is None else _result(arm)
        lines.append(f"| {arm.name} | {result} |")
    return "\n".join([head, "", *lines])


def _result(arm: Arm) -> str:
    numbers = "the same numbers" if arm.same else "other numbers"
    runs = "" if arm.num_runs == 1 else f" ({arm.num_runs} runs)"
    if arm.is_mixed:
        return f"not finite in {arm.num_bad} of {arm.num_runs} runs, {numbers}"
    return f"{'not finite' if arm.is_bad else 'finite'}, {numbers}{runs}"


def carriers_text(carriers: Carriers) -> str:
    """Who carries a spike."""
    lines = ["## Who carries it", "", f"{carriers.num_samples} samples were run by themselves."]
    outstanding = carriers.outstanding
    if outstanding:
        names = ", ".join(str(one.sample) for one in outstanding)
        lines.append(f"**Samples that stand out: {names}.**")
    else:
        lines.append("**No sample stands out.**")
    lines += ["", "| sample | rank | micro-batch | its gradient's norm | its loss |", "|---|---|---|---|---|"]
    lines += [
        f"| {one.sample} | {one.rank} | {one.micro_batch} | {one.grad_norm:.4g} | {one.loss:.4g} |"
        for one in carriers.samples
    ]
    lines += [f"| median | | | {carriers.median:.4g} | |", "", "| parameter | norm | before | share |"]
    lines.append("|---|---|---|---|")
    for share in carriers.parameters:
        before = "" if share.usual_norm is None else f"{share.usual_norm:.4g}"
        lines.append(f"| {share.name} | {share.grad_norm:.4g} | {before} | {share.share:.1%} |")
    return "\n".join(lines)


def cause_data(cause: Cause) -> dict[str, Any]:
    """A cause as plain data."""
    producer = cause.producer
    return {
        "rank": cause.rank,
        "micro_batch": cause.micro_batch,
        "only_together": cause.only_together,
        "loss": cause.loss,
        "producer": operation_data(producer) if isinstance(producer, Operation) else None,
        "bad_before": producer if isinstance(producer, str) else None,
        "propagators": [
            operation_data(one) for one in cause.way[1 : 1 + SHOWN] if isinstance(one, Operation)
        ],
        "num_propagators": max(0, len(cause.way) - 1),
        "samples": [] if cause.blame is None else list(cause.blame.samples),
        "samples_reason": None if cause.blame is None else cause.blame.reason,
        "activations": [dataclasses.asdict(one) for one in cause.activations],
        "attention_logits": cause.attention_logits,
    }


def operation_data(operation: Operation) -> dict[str, Any]:
    """An operation as plain data."""
    return {
        "operation": operation.name,
        "direction": operation.direction,
        "makes": operation.makes,
        "module": operation.place.module,
        "module_type": operation.place.module_type,
        "file": operation.place.file,
        "line": operation.place.line,
        "code": operation.place.code,
        "forward_operation": operation.forward_name,
        "parameter": operation.parameter,
        "inputs": [dataclasses.asdict(note) for note in operation.inputs],
        "output": dataclasses.asdict(operation.output),
    }


def carriers_data(carriers: Carriers) -> dict[str, Any]:
    """Carriers as plain data."""
    return {**dataclasses.asdict(carriers), "outstanding": [one.sample for one in carriers.outstanding]}


def module_text(operation: Operation) -> str:
    """The module of an operation, in words."""
    place = operation.place
    if place.module is None:
        return "no module (the loss)"
    name = place.module or "the model itself"
    return f"{name} ({place.module_type})" if place.module_type else name


def note_text(note: TensorNote) -> str:
    """A tensor in numbers, in words."""
    text = f"{note.dtype} {list(note.shape)}"
    if math.isfinite(note.smallest):  # else nothing in it is
        text += f", finite values from {note.smallest:.4g} to {note.largest:.4g}"
    for count, what in ((note.num_zero, "zeros"), (note.num_nan, "NaN"), (note.num_inf, "Inf")):
        text += f", {count} {what}" if count else ""
    return text


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
