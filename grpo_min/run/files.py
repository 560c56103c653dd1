"""Files: read with an error of one line, written so that a crash leaves the old one."""
import hashlib
import itertools
import os
from contextlib import contextmanager
from pathlib import Path

from grpo_min.run.config import UserError

DATA = Path(__file__).parent.parent.parent / "data"


@contextmanager
def one_line(action):
    """An OSError becomes a UserError: cannot do that, and why."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {action}: {error.strerror}")


def read_text(path):
    try:
        with one_line(f"read {path}"):
            return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is not UTF-8 text")


def fingerprint(path):
    """Eight hex digits of a file's contents, so that a run knows what it started from."""
    with one_line(f"read {path}"):
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]


def save_file(path, content):
    """Write to a temporary file and rename it: readers see the old or the new."""
    temporary = Path(f"{path}.{os.getpid()}.tmp")  # another process may save it, too
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kept = " (the last good one is intact)" if Path(path).exists() else ""
        raise UserError(f"cannot write {path}: {error.strerror}{kept}", exit_code=1)


def make_folder(folder):
    with one_line(f"make the folder {folder}"):
        Path(folder).mkdir(parents=True, exist_ok=True)


def move_aside(folder):
    """Rename a folder to the first free NAME.1, NAME.2, ...: what was there is kept."""
    n = next(n for n in itertools.count(1) if not Path(f"{folder}.{n}").exists())
    with one_line(f"keep the earlier run as {folder}.{n}"):
        folder.rename(f"{folder}.{n}")
    print(f"{folder} was there already: kept as {folder}.{n}")
