"""Where rows come from: the embedded set, local files, or the Hub; read as a stream, never held as a whole.

Rows come out as plain dicts, whatever they came from, numbered from 0 in the order of the source. A source knows
what its content is (``fingerprint``) without reading it row by row, so that a cache can be found at once.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ftlab.data.files import FILE_FORMATS, NumberedRow, arrow_rows, file_rows, find_files, readable
from ftlab.data.problems import Problem
from ftlab.data.strict_json import OnProblem
from ftlab.data.tiny import tiny_rows
from ftlab.errors import ConfigError

_HUB_TIMEOUT_S = 10
_CHUNK_ROWS = 1_000
_SMALL_FILE = 1 << 24  # bytes
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Chunk(NamedTuple):
    """Rows of one file, in order.

    Attributes:
        where: that file, or what else they came from.
        done: how much of the source's ``size`` has been read, these rows included.
    """

    where: str
    rows: list[NumberedRow]
    done: int


class Source(Protocol):
    """A set of rows."""

    def fingerprint(self) -> str: ...

    def size(self) -> tuple[int, str]: ...  # how much there is to read, and of what: "rows" or "KiB"

    def chunks(self, columns: Sequence[str] | None, on_problem: OnProblem, start: int = 0) -> Iterator[Chunk]: ...


def open_source(
    *,
    source: str,
    data_files: str | Sequence[str] | None,
    split: str | None,
    subset: str | None,
    revision: str | None,
    cache_dir: Path | None,
    streaming: bool = False,
    files_key: str = "dataset.data_files",
) -> Source:
    """The set that the configuration names; nothing is read yet. ``chunks`` begins at row ``start`` of it.

    Args:
        source: ``tiny``, a file format (``files.FILE_FORMATS``), or the id of a set on the Hub.
        data_files: path, glob, folder, or list of them; only for a file format.
        split, subset, revision: of a set on the Hub; ``split`` of the embedded one too.
        cache_dir: where hashes of large files are remembered; None: nowhere.
        files_key: of the configuration, that holds ``data_files``.
        streaming: take no copy of a set on the Hub, and do not read large files through before their first row.

    Raises:
        ConfigError: if the values contradict each other, or there is no such file.
    """
    if source in FILE_FORMATS:
        kind = StreamedFiles if streaming else FileSource
        return kind(source, find_files(data_files, source, files_key), cache_dir)
    if data_files is not None:
        raise ConfigError(
            files_key,
            f"{data_files!r} would not be read: dataset.source={source} is none of the file formats "
            f"{', '.join(FILE_FORMATS)}",
            "dataset.source=json",
        )
    if source == "tiny":
        return TinySource(split or "train")
    return (HubStream if streaming else HubSource)(source, split or "train", subset, revision)


@dataclass(frozen=True)
class TinySource:
    """One part of the embedded set: ``train`` or ``validation``."""

    part: str

    def fingerprint(self) -> str:
        """Its name: what the rows are is decided by this package's code, which every key of the cache holds."""
        return f"tiny/{self.part}"

    def size(self) -> tuple[int, str]:
        """Its rows."""
        return len(self._rows()), "rows"

    def chunks(self, columns: Sequence[str] | None, on_problem: OnProblem, start: int = 0) -> Iterator[Chunk]:  # noqa: ARG002
        """All rows at once: they are few."""
        rows = [(i, row._asdict()) for i, row in enumerate(self._rows()) if i >= start]
        yield Chunk("the tiny set", rows, len(rows))

    def _rows(self) -> list[Any]:
        train, validation = tiny_rows()
        return validation if self.part == "validation" else train


@dataclass(frozen=True)
class FileSource:
    """Files of one format; their rows are numbered through."""

    format: str
    files: Sequence[Path]
    cache_dir: Path | None

    def fingerprint(self) -> str:
        """A digest of the files' content, wherever they lie."""
        digests = [self.format, *(file_digest(file, self.cache_dir) for file in self.files)]
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()

    def size(self) -> tuple[int, str]:
        """What the files take on the disk."""
        return sum(file.stat().st_size for file in self.files) // 1024, "KiB"

    def chunks(self, columns: Sequence[str] | None, on_problem: OnProblem, start: int = 0) -> Iterator[Chunk]:
        """The files' rows, file by file."""
        first_row = n_before = 0

        def meet(problem: Problem) -> None:
            nonlocal first_row
            if problem.row is not None:  # the last row of a file has its number too, if nobody can read it
                first_row = max(first_row, problem.row + 1)
            on_problem(problem)

        for file in self.files:
            size = file.stat().st_size
            with file.open("rb") as raw:
                rows = file_rows(self.format, file, raw, columns, meet, first_row, start)
                while held := list(itertools.islice(rows, _CHUNK_ROWS)):
                    first_row = max(first_row, held[-1][0] + 1)
                    if held[0][0] < start:
                        held = [row for row in held if row[0] >= start]
                    n_read = size if raw.closed else raw.tell()  # Arrow closes what it has read to the end
                    if held:
                        yield Chunk(str(file), held, (n_before + n_read) // 1024)
            n_before += size


class StreamedFiles(FileSource):
    """Files that may be too many to read before training begins: the large ones are known by their size and ends."""

    def fingerprint(self) -> str:
        """A digest of small files' content, of large ones' size and first and last MiB."""
        digests = [self.format]
        for file in self.files:
            size = file.stat().st_size
            if size <= _SMALL_FILE:
                digests.append(file_digest(file, None))
                continue
            with file.open("rb") as stream:
                ends = stream.read(1 << 20)
                stream.seek(-(1 << 20), os.SEEK_END)
                digests.append(f"{size} {hashlib.sha256(ends + stream.read()).hexdigest()}")
        return hashlib.sha256("\n".join(digests).encode()).hexdigest()


def file_digest(file: Path, cache_dir: Path | None) -> str:
    """sha256 of a file's content, remembered by path, size, time and inode as long as none of them changes."""
    stat = file.stat()
    path = str(file.resolve())
    state = [path, stat.st_size, stat.st_mtime_ns, stat.st_ino]
    memo = None
    if cache_dir is not None and stat.st_size > _SMALL_FILE:  # below, hashing costs less than remembering
        memo = cache_dir / "files" / hashlib.sha256(path.encode()).hexdigest()[:32]
        with suppress(OSError, ValueError, KeyError):
            known = json.loads(memo.read_text(encoding="utf-8"))
            # A file changed within the second it was hashed in may look the same: such a memory is not trusted.
            if known["state"] == state and known["hashed_ns"] > stat.st_mtime_ns + 2 * 10**9:
                return known["digest"]
    hashed_ns = time.time_ns()
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if memo is not None:
        with suppress(OSError):
            memo.parent.mkdir(parents=True, exist_ok=True)
            aside = memo.with_suffix(f".{os.getpid()}")
            aside.write_text(json.dumps({"state": state, "hashed_ns": hashed_ns, "digest": digest}), encoding="utf-8")
            aside.replace(memo)
    return digest


# ---- the Hub ---------------------------------------------------------------------------------------------


@dataclass
class HubSource:
    """One split of a set on the Hub, read with ``datasets``.

    Attributes:
        revision: a commit, tag or branch; a commit needs no network once it is in the Hub's cache.
    """

    repo_id: str
    split: str
    subset: str | None
    revision: str | None
    _commit: str | None = None

    def fingerprint(self) -> str:
        """The commit that ``revision`` means now, or meant last when there is no network."""
        commit = self._resolved()
        return hashlib.sha256(repr((self.repo_id, commit, self.subset, self.split)).encode()).hexdigest()

    def size(self) -> tuple[int, str]:
        """Its rows."""
        return len(self._load()), "rows"

    def chunks(self, columns: Sequence[str] | None, on_problem: OnProblem, start: int = 0) -> Iterator[Chunk]:
        """The split's rows."""
        loaded = self._load()
        if (wanted := readable(columns, loaded.column_names or ())) is not None:
            loaded = loaded.select_columns(wanted)
        if start >= getattr(loaded, "num_rows", start + 1):  # of a stream nobody knows, and it skips what is not there
            return
        if start:
            loaded = loaded.skip(start)
        where, row = f"{self.repo_id} ({self.split})", start
        for batch in loaded.with_format("arrow").iter(_CHUNK_ROWS):
            rows = list(arrow_rows(batch, where, on_problem, row))
            row += len(batch)
            if rows:
                yield Chunk(where, rows, row)

    def _load(self, **how: Any) -> Any:
        """The split, mapped from the cache of ``datasets``."""
        commit = self._resolved()

        def load() -> Any:
            import datasets

            return datasets.load_dataset(self.repo_id, self.subset, split=self.split, revision=commit, **how)

        try:
            return _quietly(load)
        except Exception as error:  # the Hub's client, its HTTP library and `datasets` each raise their own kinds
            raise self._unreachable(error) from error

    def _resolved(self) -> str | None:
        if self._commit is None:
            if self.revision is not None and _COMMIT.fullmatch(self.revision):
                self._commit = self.revision
            else:
                self._commit = self._ask_hub()
        return self._commit

    def _ask_hub(self) -> str | None:
        from huggingface_hub import HfApi, constants

        if constants.HF_HUB_OFFLINE:
            return self._last_known(constants.HF_HUB_CACHE)
        try:
            # A plain request: it fails at once without a network, where `datasets` retries for 20 s.
            return HfApi().dataset_info(self.repo_id, revision=self.revision, timeout=_HUB_TIMEOUT_S).sha
        except Exception as error:
            if (known := self._last_known(constants.HF_HUB_CACHE)) is not None:
                return known
            raise self._unreachable(error) from error

    def _last_known(self, hub_cache: str) -> str | None:
        """The commit that the Hub's own cache on this machine has for the revision."""
        folder = Path(hub_cache) / f"datasets--{self.repo_id.replace('/', '--')}" / "refs" / (self.revision or "main")
        return folder.read_text().strip() if os.path.isfile(folder) else None

    def _unreachable(self, error: Exception) -> ConfigError:
        which = ", ".join(filter(None, (self.subset, f"split {self.split!r}", self.revision)))
        return ConfigError(
            "dataset.source",
            f"the set {self.repo_id!r} ({which}) cannot be had from the Hub: {_root_cause(error)}",
            "dataset.source=json dataset.data_files=/path/to/a/local/copy.json   "
            "(a gated set also needs HF_TOKEN; HF_HUB_OFFLINE=1 uses the Hub's cache on this machine)",
        )


class HubStream(HubSource):
    """The same, read over the network as it is needed; no copy is kept."""

    def size(self) -> tuple[int, str]:
        """Unknown: nobody has counted the rows."""
        return 0, "rows"

    def _load(self, **how: Any) -> Any:
        return super()._load(streaming=True, **how)


def _quietly(load: Callable[[], Any]) -> Any:
    """What ``load`` returns; the bars and log lines of ``datasets`` stay off."""
    import datasets

    bars, verbosity = not datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs on failure is in our error too
    try:
        return load()
    finally:
        datasets.logging.set_verbosity(verbosity)
        if bars:
            datasets.enable_progress_bars()


def _root_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__
