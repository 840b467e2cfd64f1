"""A metric is called what its user calls it: no name of the log's or a mirror's own costs it its values."""

from __future__ import annotations

from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from harness.runlog.digest import Digest
from harness.runlog.nodes import NodeLog
from harness.runlog.reader import open_run
from harness.tracking import RunLog, sync_run
from tests.support.events import shown_scalars
from tests.support.wandb_offline import history

NAMES = [
    "step", "time", "attempt", "_step", "_timestamp", "_runtime", "_wandb", "kind", "values", "nonfinite",
    "run", "hparams", "end", "events/incident", "epoch", "name", "user/step", "user/user/step", "", "notes",
    "picture", "system/cpu_frac", "layers/grad_norm/a", "x" * 3000, "a b/ü\n", "metric", "value", "state",
]  # fmt: skip


def test_every_name_keeps_its_values_in_the_log_and_in_both_mirrors(tmp_path: Path) -> None:
    values = {name: float(number) for number, name in enumerate(NAMES)}
    with RunLog(tmp_path) as log:
        log.write("hparams", {"lr": 0.1})
        log.write("text", {"notes": "a text", "run": "another"}, step=0)
        log.write("event", {"name": "incident", "rank": 1}, step=0)
        NodeLog(tmp_path).write("system", {"system/cpu_frac": 0.5})
        for step in range(3):
            log.write("step", {name: value + 100 * step for name, value in values.items()}, step=step)
        NodeLog(tmp_path).write("system", {"system/cpu_frac": 0.5})
    run, digest = open_run(tmp_path), Digest(tmp_path)
    digest.refresh()
    for name, value in values.items():
        truth = [value, value + 100, value + 200]
        assert run.scalars(name).values.tolist() == truth, name
        assert digest.bands(name).mean.tolist() == truth, name
        assert run.last(name) == digest.last(name) == truth[-1], name
    assert set(digest.names()) == set(run.names())

    assert sync_run(tmp_path, wandb="offline", system_every_s=0.0) == ["tensorboard", "wandb"]
    rows = [row for row in history(tmp_path) if row.get("epoch") is not None]
    assert [row["step"] for row in rows] == [0, 1, 2]
    for row in rows:
        shown = {value for name, value in row.items() if isinstance(value, float | int)}
        assert {value + 100 * row["step"] for value in values.values()} <= shown
    assert rows[1]["user/step"] == values["step"] + 100
    assert rows[1]["user/_timestamp"] == values["_timestamp"] + 100

    accumulator = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    shown_tags = accumulator.Tags()["scalars"]
    first = [shown_scalars(tmp_path / "tensorboard", tag)[0] for tag in shown_tags]
    assert sorted(value for _, value in first) == sorted(values.values())
    assert not set(shown_tags) & set(accumulator.Tags()["tensors"])
