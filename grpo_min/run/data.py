"""Rows of data: read, checked, and dealt out in batches."""
import json
from operator import itemgetter

import torch

from grpo_min.run.config import UserError, require
from grpo_min.run.files import one_line
from grpo_min.run.ranks import RANKS, share
from grpo_min.run.rng import generator

BLANK = b"\xef\xbb\xbf \t\r\n"      # bytes of an empty line, a byte order mark among them


def read_jsonl(path, fields, at_least=1):
    """Rows of a JSONL file as checked_rows gives them. Empty lines are passed over."""
    with one_line(f"read {path}"), open(path, "rb") as file:
        rows = ((number, parse_json(line, f"{path}, line {number}"))
                for number, line in enumerate(file, start=1) if line.strip(BLANK))
        return checked_rows(rows, fields, path, "line", at_least)


def checked_rows(rows, fields, path, unit, at_least=1):
    """(number, row) pairs -> a list of dicts, or a UserError. The named fields are strings.
    All rows get the same fields: None where one lacks what others have."""
    checked, names = [], {}
    for number, row in rows:
        place = f"{path}, {unit} {number}"
        require(isinstance(row, dict), f"{place}: not an object with named fields")
        checked.append(row | {field: text(row, field, place) for field in fields})
        names |= dict.fromkeys(row)
    require(len(checked) >= at_least,
            f"{path} has {len(checked) or 'no'} {unit}s, where {at_least} are needed")
    return [names | row for row in checked]


def text(row, field, place):
    """A field of a row as a string, a number too (28 and 28.0 as "28"); or a UserError."""
    value = row.get(field)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and value == value:
        return str(value)
    if isinstance(value, str):
        return value
    what = "is missing" if field not in row else f"is {json.dumps(value)[:40]}"
    from grpo_min.run.formats import advice
    raise UserError(f"{place}: the field \"{field}\" {what}, where text or a number is "
                    f"needed (found: {', '.join(map(str, row)) or 'nothing'})"
                    f"{advice(row, field)}")


def parse_json(line, place):
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise UserError(f"{place}: not UTF-8")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON ({error})")


def columns(rows):
    """[{prompt: .., answer: ..}, ..] -> {prompt: [..], answer: [..]}."""
    return {name: list(map(itemgetter(name), rows)) for name in rows[0]}


def batch_rows(count, batch_size, seed, step):
    """This rank's rows of a step's batch. Each epoch has an order of its own, and its last
    incomplete batch is left out."""
    require(batch_size <= count, f"a batch of {batch_size} from only {count} rows")
    require(batch_size % RANKS == 0,
            f"a batch of {batch_size} does not divide among {RANKS} ranks")
    epoch, index = divmod(step, count // batch_size)
    order = torch.randperm(count, generator=generator(seed, epoch, rank=0))
    return share(order[index * batch_size:(index + 1) * batch_size].tolist())
