"""`curves.png`: drawn from bands, outside the process that trains."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from harness.runlog import digest as digests
from harness.runlog.preview import open_whole
from harness.tracking import RunLog, start_mirrors
from harness.tracking.plots import MAX_POINTS, draw_run


def test_the_picture_of_a_long_run_is_bounded_and_keeps_its_spike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "MOST", 256)
    num_steps, spike = 6000, 3333
    with RunLog(tmp_path) as log:
        for step in range(num_steps):
            loss = {spike: 1e6, spike + 1: math.nan}.get(step, 1.0)
            log.write("step", {"train/loss": loss, "guard/num_nan": 7 * (step == spike + 1)}, step=step)
    figure = draw_run(open_whole(tmp_path))
    loss, _, nonfinite = figure.axes
    band = loss.collections[0].get_paths()[0].vertices
    assert max(len(line.get_xdata()) for axis in figure.axes for line in axis.lines) <= MAX_POINTS
    assert np.nanmax(band[:, 1]) == 1e6
    assert abs(band[np.nanargmax(band[:, 1]), 0] - spike) <= num_steps / 128
    assert nonfinite.lines[0].get_ydata().tolist() == [7.0]


@pytest.mark.parametrize("picture", [True, False])
def test_the_side_process_has_it_drawn_where_that_is_asked_for(tmp_path: Path, picture: bool) -> None:
    log = RunLog(tmp_path)
    mirrors = start_mirrors(tmp_path, alerts=(), system_every_s=0, tensorboard=False, picture=picture)
    log.write("step", {"train/loss": 1.0}, step=0)
    log.close()
    assert mirrors.close(150)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["curves.png"] * picture
    if picture:
        with Image.open(tmp_path / "curves.png") as image:
            assert image.size[0] == 1650
