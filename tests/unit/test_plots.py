"""The pictures of a run."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ftlab.plots import draw_plots, smooth


def write_metrics(folder, n, *, validation=True):
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(1, n + 1):
            row = {"step": step, "train/loss": 3 / step, "train/lr": 1e-3, "perf/tokens_per_s": 5e4}
            file.write(json.dumps(row) + "\n")
            if validation and step % 10 == 0:
                file.write(json.dumps({"step": step, "val/loss": 3 / step}) + "\n")


def is_picture(path):
    return path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5_000


@pytest.mark.parametrize(("n", "validation"), [(1, False), (3, True), (60, False), (5000, True)])
def test_every_length_of_run_gives_the_three_pictures(tmp_path, n, validation, recwarn):
    write_metrics(tmp_path, n, validation=validation)
    written = draw_plots(tmp_path)
    assert written == [tmp_path / "plots" / f"{name}.png" for name in ("loss", "lr", "throughput")]
    assert all(is_picture(path) for path in written)
    assert not recwarn.list


def test_a_run_that_logged_nothing_gives_no_picture(tmp_path):
    assert draw_plots(tmp_path) == []


def test_a_torn_last_line_and_a_non_finite_loss_are_no_obstacle(tmp_path):
    write_metrics(tmp_path, 200)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 201, "train/loss": null}\n{"step": 202, "train/lo')
    assert all(is_picture(path) for path in draw_plots(tmp_path))


def test_a_run_whose_every_loss_is_nan_still_gives_a_picture(tmp_path):
    rows = [{"step": step, "train/loss": None} for step in range(30)]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert draw_plots(tmp_path) == [tmp_path / "plots" / "loss.png"]


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    write_metrics(tmp_path, 3)
    draw_plots(tmp_path)
    assert dict(mpl.rcParams) == before


def test_the_smoothed_curve_does_not_trail_behind():
    line = np.linspace(4.0, 1.0, 100)
    assert np.allclose(smooth(line, width=3)[15:-15], line[15:-15])


def test_a_constant_stays_constant_up_to_both_ends():
    assert np.allclose(smooth(np.full(7, 2.5), width=4), 2.5)
