"""Tables of numbers as CSV: metrics.csv of a run, and the results of studies."""
import csv
import io
import itertools

from grpo_min.run.files import save_file


def number(text):
    """A cell as it was: int, float, or "" where nothing was measured."""
    return text and (int(text) if text.lstrip("-").isdigit() else float(text))


def column_names(rows):
    """The columns of a list of rows, in the order in which they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row))


def write_csv(path, rows):
    file = io.StringIO()
    if rows:
        writer = csv.DictWriter(file, column_names(rows))
        writer.writeheader()
        writer.writerows(rows)
    save_file(path, file.getvalue().encode())


def read_csv(path, count=None):
    """The first `count` rows (all, unless told)."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(itertools.islice(csv.DictReader(file), count))
    for row in rows:
        row.update({name: number(text) for name, text in row.items()})
    return rows
