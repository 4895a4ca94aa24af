"""The log of a training: its progress bar."""

from harmonica_dit.train.log import COLUMNS, Log

LINE = dict.fromkeys(COLUMNS, 0.0)


def test_the_bar_counts_trajectories_from_where_the_training_goes_on():
    with Log(None, total=5, first=2, progress=False) as log:
        for done in (3, 4):
            log.line(**LINE)
            assert [(task.completed, task.total) for task in log._bar.tasks] == [(done, 5)]
