"""Rows of other projects' data: how they are written in ours."""

TURN = '.rsplit("\\n\\nAssistant: ", 1)'
FORMATS = {  # {name: (its fields, what to write for each row)}
    "GSM8K": ({"question", "answer"}, '"prompt": row["question"], '
              '"answer": row["answer"].split("#### ")[1]'),
    "HH-RLHF": ({"chosen", "rejected"}, f'"prompt": row["chosen"]{TURN}[0], "chosen": '
                f'row["chosen"]{TURN}[1], "rejected": row["rejected"]{TURN}[1]'),
    "a conversation": ({"messages"}, '"prompt": row["messages"][0]["content"], '
                       '"response": row["messages"][1]["content"]'),
    "Alpaca": ({"instruction", "output"}, '"prompt": row["instruction"], '
               '"response": row["output"]'),
    "a prompt-completion set": ({"prompt", "completion"}, '"prompt": row["prompt"], '
                                '"response": row["completion"]'),
}


def advice(row, field):
    """What to write in place of a row whose field is no text, if its format is known."""
    value = row.get(field)
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        return f". If these are messages, write row[\"{field}\"][-1][\"content\"]"
    for name, (fields, way) in FORMATS.items():
        if fields <= row.keys():
            return f". If this is {name}, write {{{way}}} for each row"
    return ""
