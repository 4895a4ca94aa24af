"""The log of a training: a progress bar, a CSV file and TensorBoard files."""

import csv
import warnings
from collections.abc import Iterable
from pathlib import Path

from harmonica_dit.files import naming, replacement
from harmonica_dit.progress import progress_bar

COLUMNS = ("trajectory", "seconds", "loss", "error", "importance", "beta", "threshold", "cur", "speedup")

EVENTS = ".harmonica"  # ends the name of our event file


class Log:
    """Logs one line per trajectory.

    Args:
        out: folder of `log.csv` and the TensorBoard files, None for no files.
        total: number of trajectories. first: how many of them are done already; later lines of the CSV are dropped.
        progress: whether a progress bar is shown.
    """

    def __init__(self, out: Path | None, total: int, first: int, progress: bool):
        self._bar = progress_bar(shown=progress)
        self._task = self._bar.add_task("training the router", total=total, completed=first)
        self._file = self._board = None
        if out is not None:
            path = out / "log.csv"
            kept = path.read_bytes().splitlines(keepends=True)[: first + 1] if first and path.exists() else []
            before = read(path, kept)
            with replacement(path) as temporary:
                temporary.write_bytes(b"".join(kept) or (",".join(COLUMNS) + "\r\n").encode())
            self._file = open(path, "a", newline="")
            self._csv = csv.DictWriter(self._file, COLUMNS)
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                warnings.warn("tensorboard is not installed: the log is written to log.csv only", stacklevel=4)
            else:
                for old in out.glob(f"events.out.tfevents.*{EVENTS}"):  # one file a training, however often it goes on
                    old.unlink()
                with naming(out):
                    self._board = SummaryWriter(str(out), filename_suffix=EVENTS)
                for values in before:
                    self._plot(values)

    def __enter__(self) -> "Log":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        self._bar.stop()
        if self._file is not None:
            with naming(self._file.name):
                self._file.close()  # which writes what could not be written
        if self._board is not None:
            with naming(self._board.log_dir):
                self._board.close()

    def line(self, **values: float) -> None:
        """Logs one trajectory; `values` has a value for each of COLUMNS; importance is the mean of λ as measured."""
        if self._file is not None:
            with naming(self._file.name):
                self._csv.writerow(values)
                self._file.flush()
        if self._board is not None:
            self._plot(values)
        text = (f"loss {values['loss']:.3g}  CUR {100 * values['cur']:.1f} %  speedup {values['speedup']:.2f}×  "
                f"λ {values['importance']:.2g}  β {values['beta']:.2g}")
        self._bar.update(self._task, advance=1, description=text)

    def _plot(self, values: dict[str, float]) -> None:
        with naming(self._board.log_dir):  # its thread's errors are raised here
            for name in COLUMNS[1:]:
                self._board.add_scalar(name, values[name], int(values["trajectory"]))


def read(path: Path, lines: Iterable[bytes]) -> list[dict[str, float]]:
    """The values of a log's lines, the first of which names the columns.

    Raises:
        ValueError: they are no log's; the message names the file.
    """
    try:
        found = [{name: float(line[name]) for name in COLUMNS} for line in csv.DictReader(map(bytes.decode, lines))]
        numbers = [values["trajectory"] for values in found]
        if not all(0 <= number < 1 << 32 and number.is_integer() for number in numbers):
            raise ValueError(f"trajectories {numbers}")
        return found
    except (ValueError, TypeError, KeyError, csv.Error) as error:
        raise ValueError(f"{path} is no log of a training ({error!s:.200}); give another folder, or remove it") \
            from None
