"""The overhead benchmark runs: every loop trains, and each is divided by the bare one."""

from benchmarks.loops.works import Setting
from benchmarks.overhead import BASE, add_figures, compare, contestants
from benchmarks.support.report import Report


def test_every_hand_written_loop_and_ours_train_and_are_compared() -> None:
    setting = Setting("mlp", "scaled")
    result = compare(setting, rounds=2, block_seconds=0.0, peers=False)
    assert result["steps"] == 32
    assert result["seconds"].keys() == contestants(peers=False).keys()
    assert all(second > 0 for seconds in result["seconds"].values() for second in seconds)
    report = Report("overhead", {})
    add_figures(report, setting, 2, {BASE: [1.0, 2.0], "ours, job": [1.5, 2.2]})
    assert report.figures["mlp/scaled/2 threads/ours, job"].values == (1.5, 1.1)
    assert report.figures["mlp/scaled/2 threads/ours, job"].better == "lower"
