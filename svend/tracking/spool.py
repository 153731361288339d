"""A run's record on the local disk, which a thread tells the tracking store as it can.

Training writes a line and goes on. The thread sends what is on the disk, in order; while the store
is down, slow or answers errors, the lines wait. How far it came is written down too, so that
another process, after a kill or an end, sends exactly the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from svend.errors import TrackingError, reason_of
from svend.tracking.delivery import Entry, EntryKind, deliver, is_refusal
from svend.tracking.store_errors import store_error, store_reason

SPOOL = "tracking"  # the spool's folder in a run's folder
ENTRIES, SENT, ADDRESS = "entries.jsonl", "sent", "address.json"
FILES = "files"
REASON_TAG = "svend.reason"
DIED = "the process ended without a word; the same command with resume=true goes on"
REFUSED = "refused.jsonl"
FLUSH_SECONDS = 5.0
LOOK_SECONDS = 0.1
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 15.0
# Entries in one go; what is sent again after a kill in between.
CHUNK_ENTRIES = 1000


@dataclass(frozen=True)
class RunAddress:
    """Where a run is: what must be known of it while its store does not answer."""

    run_id: str
    experiment_id: str
    name: str
    tracking_uri: str


class Spool:
    """The entries of one run, appended to a file; `sender` tells them to its store."""

    def __init__(self, folder: Path, address: RunAddress) -> None:
        self.folder = folder
        self.address = address
        self._lock = threading.Lock()
        # What a full disk would not take; it is tried again with the next entry.
        self._unwritten: deque[bytes] = deque()
        self._file = os.open(folder / ENTRIES, os.O_RDWR | os.O_CREAT, 0o644)
        self._end = _length_of_whole_lines(folder / ENTRIES)
        os.ftruncate(self._file, self._end)  # a line torn by a kill was never sent

    @classmethod
    def create(cls, folder: Path, address: RunAddress) -> Spool:
        """Begin a spool for a run that is new."""
        folder.mkdir(parents=True, exist_ok=True)
        _replace(folder / ADDRESS, json.dumps(asdict(address), indent=1))
        return cls(folder, address)

    @classmethod
    def open(cls, folder: Path) -> Spool:
        """Go on with a spool. Raises TrackingError if there is none or it is damaged."""
        try:
            told = json.loads((folder / ADDRESS).read_text(encoding="utf-8"))
            return cls(folder, RunAddress(**told))
        except (OSError, ValueError, TypeError) as error:
            raise TrackingError(
                f"{folder}: is no record of a run's tracking ({reason_of(error)}); restore it"
            ) from None

    @property
    def end(self) -> int:
        """The length of what is written, in bytes."""
        return self._end

    @property
    def sent(self) -> int:
        """How much of it the store has, in bytes."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            return min(int((self.folder / SENT).read_text(encoding="utf-8")), self._end)
        return 0

    def tell(self, entry: Entry) -> None:
        """Write an entry down. It survives a kill of the process from here on."""
        self._append(entry.to_line().encode())

    def tell_file(self, content: bytes | Path, artifact: str, *, is_table: bool = False) -> None:
        """Keep a file, given by its content or place, that is to become an artifact."""
        with self._lock:
            place = self.folder / FILES / str(self._end + len(self._unwritten))
        place = place / Path(artifact).name
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, place)
            else:
                place.write_bytes(content)
        except OSError as error:
            raise TrackingError(
                f"{place}: cannot be written ({error.strerror}); make room, and go on with "
                "resume=true"
            ) from error
        self.tell(Entry.file(place.relative_to(self.folder), artifact, is_table=is_table))

    def go_back(self, step: int) -> None:
        """Write down that the run went back to a step: what follows is new, not a repetition."""
        self._append((json.dumps({"back_to_step": step}) + "\n").encode())

    def sync(self) -> None:
        """Have the disk keep what is written, so that it survives the machine too."""
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)

    def read(self, start: int, limit: int) -> tuple[list[Entry], int]:
        """Return up to `limit` entries from a place on, and the place after them."""
        entries: list[Entry] = []
        for entry, place in self._lines(start):
            start = place
            if entry is not None:
                entries.append(entry)
            if len(entries) == limit:
                break
        return entries, start

    def mark_sent(self, place: int) -> None:
        """Write down that the store has what lies before a place."""
        _replace(self.folder / SENT, str(place))

    def points_from(self, step: int) -> Counter[tuple[str, int]]:
        """Count the points of this step and later ones, by metric and step."""
        found: Counter[tuple[str, int]] = Counter()
        for entry, _ in self._lines(0):
            if entry is None:
                found.clear()  # the run went back: those points were of weights that were given up
            elif entry.kind is EntryKind.METRICS and entry.content["step"] >= step:
                found.update((key, entry.content["step"]) for key in entry.content["values"])
        return found

    def last_step(self, prefix: str) -> int | None:
        """Return the last step of the metrics that begin so, None if there is none."""
        return max(
            (entry.content["step"] for entry, _ in self._lines(0)
             if entry is not None and entry.kind is EntryKind.METRICS
             and any(key.startswith(prefix) for key in entry.content["values"])),
            default=None,
        )

    def last_status(self) -> str | None:
        """Return the status that was last written down, None if none was."""
        status = None
        for entry, _ in self._lines(0):
            if entry is not None and entry.kind is EntryKind.STATUS:
                status = str(entry.content["status"])
        return status

    def _append(self, line: bytes) -> None:
        with self._lock:
            self._unwritten.append(line)
            while self._unwritten:
                line = self._unwritten[0]
                try:
                    written = os.pwrite(self._file, line, self._end)
                except OSError:
                    written = 0
                if written < len(line):
                    os.ftruncate(self._file, self._end)
                    return
                self._end += written
                self._unwritten.popleft()

    def _lines(self, start: int) -> Iterator[tuple[Entry | None, int]]:
        """Yield each entry from a place on, None where the run went back, and the place after."""
        with (self.folder / ENTRIES).open("rb") as stream:
            stream.seek(start)
            while stream.tell() < self._end:
                line = stream.readline()
                gone_back = line.startswith(b'{"back_to_step"')
                yield None if gone_back else Entry.parse(line), stream.tell()


class SpoolSender:
    """The thread that tells a run's store what its spool holds."""

    def __init__(self, spool: Spool, notify: Callable[[str], None]) -> None:
        self._spool = spool
        self._notify = notify
        self._client = MlflowClient(spool.address.tracking_uri)
        self._sent = spool.sent
        self._failed_since: float | None = None
        self._reason = ""
        self._changed = threading.Condition()
        self._urgent = self._closing = False
        self._thread = threading.Thread(target=self._run, name="tracking", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def reason(self) -> str:
        """Why the last try failed; empty if it did not."""
        return self._reason

    def flush(
        self, timeout_seconds: float, give_up: Callable[[], bool] = lambda: False
    ) -> bool:
        """Wait until the store has all that is written now; return whether it has."""
        wanted = self._spool.end
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            self._urgent = True
            self._changed.notify_all()
            while self._sent < wanted and time.monotonic() < deadline and not give_up():
                self._changed.wait(LOOK_SECONDS)
            return self._sent >= wanted

    def close(self, timeout_seconds: float, give_up: Callable[[], bool] = lambda: False) -> bool:
        """Send what is left, but not longer than this, and end; return whether all was sent."""
        sent = self.flush(timeout_seconds, give_up)
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if sent:
            self._thread.join()
        return sent

    def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while True:
            with self._changed:
                failing = self._failed_since is not None
                self._changed.wait_for(
                    lambda: self._closing or (self._urgent and not failing),  # noqa: B023
                    pause_seconds if failing else FLUSH_SECONDS,
                )
                if self._closing:
                    return
                self._urgent = False
            try:
                self._send()
            except Exception as error:  # noqa: BLE001
                # Whatever it is, the entries are on the disk and training is not concerned.
                pause_seconds = min(2 * pause_seconds, LONGEST_PAUSE_SECONDS)
                self._note_failure(error)
            else:
                pause_seconds = FIRST_PAUSE_SECONDS

    def _send(self) -> None:
        while self._sent < self._spool.end and not self._closing:
            # First to the disk: what the store has, a crash of the machine must not take from here.
            self._spool.sync()
            send_chunk(self._client, self._spool, self._sent, self._notify)
            if self._failed_since is not None:
                seconds = time.monotonic() - self._failed_since
                self._notify(f"tracking: the store answers again, after {seconds:.0f} s")
            self._failed_since, self._reason = None, ""
            with self._changed:
                self._sent = self._spool.sent
                self._changed.notify_all()

    def _note_failure(self, error: Exception) -> None:
        self._reason = store_reason(error)
        if self._failed_since is None:
            self._failed_since = time.monotonic()
            self._notify(
                f"tracking: {self._spool.address.tracking_uri} takes nothing ({self._reason}); "
                f"training goes on, what it logs waits in {self._spool.folder}"
            )


def send_rest(
    spool: Spool, notify: Callable[[str], None], advance: Callable[[int, int], None]
) -> int:
    """Tell a run's store all that it does not have yet; return how many entries that was.

    For a run that no process trains. One whose process died without a word is ended as KILLED.
    advance: is called with the bytes that are sent, and those that there are. Raises TrackingError
    if the store does not take them.
    """
    if spool.last_status() in (None, "RUNNING"):
        spool.tell(Entry.tags({REASON_TAG: DIED}))
        spool.tell(Entry.status("KILLED"))
    client = MlflowClient(spool.address.tracking_uri)
    sent, count = spool.sent, 0
    while sent < spool.end:
        advance(sent, spool.end)
        try:
            count += send_chunk(client, spool, sent, notify)
        except (MlflowException, OSError) as error:
            raise store_error(
                f"tracking store {spool.address.tracking_uri}: does not take what waits in "
                f"{spool.folder}", error,
                "bring it back, or set MLFLOW_TRACKING_URI to where the run is now",
            ) from error
        sent = spool.sent
    return count


def send_chunk(
    client: MlflowClient, spool: Spool, start: int, notify: Callable[[str], None]
) -> int:
    """Tell the store the next entries, and write down how far it came; return how many they were.

    What the store refuses for good is kept in a file beside, and said.
    """
    entries, place = spool.read(start, CHUNK_ENTRIES)
    present = [entry for entry in entries if not _was_removed(entry, spool.folder)]
    try:
        deliver(client, spool.address.run_id, present, spool.folder)
    except MlflowException as error:
        if not is_refusal(error):
            raise
        _deliver_each(client, spool, present, notify)
    spool.mark_sent(place)
    for entry in present:
        if entry.file_place is not None:
            shutil.rmtree((spool.folder / entry.file_place).parent, ignore_errors=True)
    return len(entries)


def _was_removed(entry: Entry, folder: Path) -> bool:
    """Whether it is a file that was sent before the process that sent it could write so."""
    return entry.file_place is not None and not (folder / entry.file_place).exists()


def _deliver_each(
    client: MlflowClient, spool: Spool, entries: list[Entry], notify: Callable[[str], None]
) -> None:
    for entry in entries:
        try:
            deliver(client, spool.address.run_id, [entry], spool.folder)
        except MlflowException as error:
            if not is_refusal(error):
                raise
            with (spool.folder / REFUSED).open("a", encoding="utf-8") as stream:
                stream.write(entry.to_line())
            notify(f"warning: tracking: the store refuses {entry.kind.value} for good "
                   f"({store_reason(error)}); kept in {spool.folder / REFUSED}")


def _length_of_whole_lines(path: Path) -> int:
    """Return the length of a file up to its last line break."""
    with path.open("rb") as stream:
        end = stream.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            stream.seek(start)
            found = stream.read(end - start).rfind(b"\n")
            if found >= 0:
                return start + found + 1
            end = start
    return 0


def _replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text, encoding="utf-8")
    temporary.rename(path)
