"""Checkpoints: a folder of them, one every so many updates, of which the newest few are kept."""

import logging
import re
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from evenflow.checkpoint.manifest import FILE, checkpoints_in, is_checkpoint, is_unfinished
from evenflow.errors import BadNumbersError, ConfigError, PeerError
from evenflow.pipe.pipeline import Pipeline

_LOG = logging.getLogger(__name__)
_NAME = "step-{:08}"
_OWN = re.compile(r"step-\d{8,}")
_MOST_ROLL_BACKS = 3  # to one checkpoint

OnError = Literal["continue", "stop"]


class Checkpoints:
    """Saves a pipeline every `every` updates, asynchronously, and goes on from the newest that is whole.

    `keep_last`: how many are kept, by default all. `on_error`: what to do where one cannot be written, as on
    a full disk: "continue" warns and trains on, to try again when the next is due; "stop" raises then.
    Entered, it waits at the end for the last one, of which the same holds. Every rank has one.

    Raises `ConfigError` for a number that is none.

    >>> import tempfile, torch, evenflow
    >>> batch = torch.ones(8, 4)
    >>> def build():
    ...     return evenflow.pipeline(
    ...         torch.nn.Linear(4, 1),
    ...         loss=lambda model, b: model(b).mean(),
    ...         example=batch,
    ...         stages=1,
    ...         optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
    ...     )
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with Checkpoints(build(), folder, every=2, keep_last=1) as checkpoints:
    ...         for _ in range(5):
    ...             _ = checkpoints.pipe.step(batch)
    ...             checkpoints.updated()
    ...     again = Checkpoints(build(), folder, every=2)
    ...     again.resume().name, again.pipe.num_updates
    ('step-00000004', 4)
    """

    def __init__(
        self,
        pipe: Pipeline,
        folder: str | Path,
        *,
        every: int,
        keep_last: int | None = None,
        on_error: OnError = "continue",
    ) -> None:
        for name, number in (("every", every), ("keep_last", 1 if keep_last is None else keep_last)):
            if type(number) is not int or number < 1:
                raise ConfigError(f"Checkpoints({name}={number!r}): it is a whole number from 1 on")
        if on_error not in ("continue", "stop"):
            raise ConfigError(f'Checkpoints(on_error={on_error!r}): there are "continue" and "stop"')
        self.pipe, self.folder = pipe, Path(folder)
        self.extra: Any = None  # what the checkpoint held with which `resume` goes on
        self._every, self._keep_last, self._on_error = every, keep_last, on_error
        self._is_saving = False
        self._saved_at = pipe.num_updates  # of which update the last one is, or it began there
        self._rolled_back: dict[int, int] = {}  # how often, to the checkpoint of which update

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    def resume(self) -> Path | None:
        """Go on with the newest checkpoint that can be read; None where there is none. A collective call.

        Its `extra` is then this object's. What was not written to its end is removed. Raises what
        `Pipeline.load` does of the newest, where there are some and none can be read.
        """
        if self.pipe.is_main:
            self._tidy()
        found: list[Path] = self.pipe.share(self._own() if self.pipe.is_main else None)
        newest: ConfigError | PeerError | None = None
        for each in reversed(found):
            try:
                self.extra = self.pipe.load(each)
            except (ConfigError, PeerError) as error:
                newest = newest or error
                if self.pipe.is_main:
                    _LOG.warning("going back to an older checkpoint, because of the newest: %s", error)
            else:
                self._saved_at = self.pipe.num_updates
                return each
        if newest is not None:
            raise newest
        return None

    def updated(self, extra: Any = None) -> None:
        """An update is done: save, if it is time. A collective call.

        `extra` is saved beside (see `Pipeline.save`); a function is asked for it then.
        """
        number = self.pipe.num_updates
        if number % self._every == 0 and number != self._saved_at:  # a step that is left out updates nothing
            self.save(extra() if callable(extra) else extra)

    def save(self, extra: Any = None) -> None:
        """Begin to save, when what was begun before is written; a collective call."""
        self._settle(self._on_error)
        number = self._saved_at = self.pipe.num_updates
        self.pipe.begin_to_save(self.folder / _NAME.format(number), extra, self._thin_out)
        self._is_saving = True

    def roll_back(self, error: BadNumbersError) -> Path:
        """Go back to the newest checkpoint, after a step that was stopped; a collective call.

        What `feed` gives out next stays what is behind that step's batch: nothing is trained on again.
        Raises `error` where there is no checkpoint, and when it is the fourth time to the same one.
        """
        self._settle(self._on_error)
        found = self._own() if self.pipe.is_main else []
        newest: Path | None = self.pipe.share(found[-1] if found else None)
        if newest is None:
            error.add_note(f"There is no checkpoint in {self.folder} yet to roll back to.")
            raise error
        self.extra = self.pipe.load(newest, data=False)
        number = self._saved_at = self.pipe.num_updates
        self._rolled_back[number] = self._rolled_back.get(number, 0) + 1
        if self._rolled_back[number] > _MOST_ROLL_BACKS:
            error.add_note(f"{newest} was rolled back to {_MOST_ROLL_BACKS} times before, in vain.")
            raise error
        return newest

    def wait(self) -> None:
        """Wait until the last one is written; raises what keeps it from that. A collective call."""
        self._settle("stop")

    def close(self) -> None:
        """Wait until the last one is written, or could not be: see `on_error`. A collective call."""
        self._settle(self._on_error)

    def _settle(self, on_error: OnError) -> None:
        """Hear how the last save went: all ranks at the same place, so that all do the same."""
        if not self._is_saving:
            return
        self._is_saving = False
        try:
            self.pipe.saved()
        except Exception as error:
            if on_error == "stop":
                raise
            if self.pipe.is_main:
                _LOG.warning("a checkpoint was not written, training goes on without: %s", error)

    def _own(self) -> list[Path]:
        """The whole ones, the newest last; what others have put beside them stays."""
        return [each for each in checkpoints_in(self.folder) if _OWN.fullmatch(each.name)]

    def _thin_out(self, written: Path) -> None:
        """Keep the last ones of those up to what was written: later ones are of another run, or broken."""
        own = self._own()
        up_to = own[: own.index(written) + 1]
        for each in up_to[: -self._keep_last] if self._keep_last else ():
            _remove(each)

    def _tidy(self) -> None:
        """Finish what was cut short: put back what was to be replaced, remove what was not written."""
        for each in list(self.folder.iterdir()) if self.folder.is_dir() else ():
            if _OWN.fullmatch(each.stem) and each.suffix == ".replaced" and not each.with_suffix("").exists():
                each.rename(each.with_suffix(""))
            elif _OWN.fullmatch(each.stem) and (
                is_unfinished(each) or (not each.suffix and not is_checkpoint(each))
            ):
                _remove(each)


def _remove(folder: Path) -> None:
    """Whenever this is cut short, what is left has no manifest, and is no checkpoint."""
    (folder / FILE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
