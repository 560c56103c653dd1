"""Rows of data: read, checked, and dealt out in batches."""
import json
from operator import itemgetter

import torch

from grpo_min.run.config import UserError, require
from grpo_min.run.files import one_line
from grpo_min.run.ranks import RANKS, share
from grpo_min.run.rng import generator


def read_jsonl(path, fields, at_least=1):
    """Rows of a JSONL file, dicts in which the named fields are strings; or a UserError."""
    with one_line(f"read {path}"), open(path, "rb") as file:
        rows = (parse_json(line, f"{path}, line {number}")
                for number, line in enumerate(file, start=1))
        return checked_rows(rows, fields, path, "line", at_least)


def checked_rows(rows, fields, path, unit, at_least=1):
    """The rows as a list: dicts of equal fields, those named strings; or a UserError."""
    checked = []
    for number, row in enumerate(rows, start=1):
        place = f"{path}, {unit} {number}"
        require(isinstance(row, dict), f"{place}: not an object with named fields")
        for field in fields:
            require(isinstance(row.get(field), str),
                    f"{place}: the field \"{field}\" is missing or not a string")
        checked.append(row)
        require(row.keys() == checked[0].keys(), f"{place}: other fields than in {unit} 1")
    require(len(checked) >= at_least,
            f"{path} has {len(checked) or 'no'} {unit}s, where {at_least} are needed")
    return checked


def parse_json(line, place):
    try:
        return json.loads(line.decode("utf-8"))
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
