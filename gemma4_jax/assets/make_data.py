"""Writes the embedded chat data: seven tasks that a model of a few million parameters learns from scratch in minutes.

Every task is a rule over closed word lists, so the held-out rows ask for known words in unseen combinations: what is
measured is the rule, not memory. The expected output is the last assistant turn, a short text or one tool call.

    python -m gemma4_jax.assets.make_data        # rewrites chat_train.jsonl and chat_heldout.jsonl, byte for byte
"""

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from gemma4_jax.assets import HELDOUT, TRAIN

Row = dict[str, Any]
Maker = Callable[[random.Random], Row]

SEED = 4
NAMES = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Hugo", "Iris", "Leo")
CITIES = ("Berlin", "Cairo", "Delhi", "Lima", "London", "Oslo", "Paris", "Rome", "Sofia", "Tokyo")
WORDS = ("apple", "bird", "boat", "book", "chair", "cloud", "grape", "horse", "house", "moon", "ship", "tree")
FRUITS = ("pears", "plums", "lemons")
SKIES = ("rain", "sun", "snow", "storm")
KEYS = ("name", "age", "city")


def user(text: str) -> dict[str, Any]:
    """A user turn."""
    return {"role": "user", "content": text}


def answer(text: str) -> dict[str, Any]:
    """An assistant turn that says `text`."""
    return {"role": "assistant", "content": text}


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """An assistant turn that calls one tool; `arguments` is a mapping, as the chat template wants it."""
    function = {"name": name, "arguments": arguments}
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "call_0", "type": "function", "function": function}],
    }


def tool(name: str, description: str, **types: str) -> dict[str, Any]:
    """A tool declaration whose parameters are all required; `types` maps a parameter to its JSON type."""
    properties = {parameter: {"type": kind} for parameter, kind in types.items()}
    parameters = {"type": "object", "properties": properties, "required": list(types)}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = {
    declaration["function"]["name"]: declaration
    for declaration in (
        tool("weather", "Forecast", city="string"),
        tool("timer", "Countdown", minutes="integer"),
        tool("message", "Chat", to="string", text="string"),
        tool("train", "Ticket", start="string", end="string"),
        tool("price", "Cost", item="string"),
    )
}


# --- the tasks: each function draws one row ---------------------------------------------------------------------------


def pick(rng: random.Random) -> Row:
    """Say the word at one end of a list."""
    words = rng.sample(WORDS, rng.choice((3, 4)))
    place, index = rng.choice((("first", 0), ("last", -1)))
    form = rng.choice(("What is the {} word of: {}?", "Say the {} word: {}."))
    return {"messages": [user(form.format(place, " ".join(words))), answer(words[index])]}


def reverse(rng: random.Random) -> Row:
    """Say a list backwards."""
    words = rng.sample(WORDS, rng.choice((3, 4)))
    form = rng.choice(("Reverse: {}.", "Say backwards: {}."))
    return {"messages": [user(form.format(" ".join(words))), answer(" ".join(reversed(words)))]}


def sort(rng: random.Random) -> Row:
    """Put digits in order, either way."""
    digits = rng.sample("123456789", 3)
    order, descending = rng.choice((("low to high", False), ("high to low", True)))
    text = " ".join(sorted(digits, reverse=descending))
    return {"messages": [user(f"Sort from {order}: {' '.join(digits)}."), answer(text)]}


def add(rng: random.Random) -> Row:
    """Add two digits in a small story."""
    name, fruit = rng.choice(NAMES), rng.choice(FRUITS)
    some, more = rng.randint(1, 4), rng.randint(1, 4)
    form = rng.choice(("{0} has {1} {3} and finds {2} more. How many {3}?", "How many {3} are {1} and {2} {3}, {0}?"))
    return {"messages": [user(form.format(name, some, more, fruit)), answer(str(some + more))]}


def json_record(rng: random.Random) -> Row:
    """Turn a sentence into a JSON object with the keys in the order asked for."""
    record = dict(zip(KEYS, (rng.choice(NAMES), rng.randint(10, 99), rng.choice(CITIES)), strict=True))
    keys = rng.sample(KEYS, 2)
    sentence = rng.choice(("{name} is {age} and lives in {city}.", "{name} from {city} is {age}.")).format(**record)
    text = json.dumps({key: record[key] for key in keys}, separators=(",", ":"))
    return {"messages": [user(f"{sentence} JSON with {' and '.join(keys)}?"), answer(text)]}


def request(rng: random.Random) -> tuple[str, str, dict[str, Any]]:
    """A wish that one tool fulfils: (text, tool name, arguments)."""
    name = rng.choice(tuple(TOOLS))
    if name == "weather":
        city = rng.choice(CITIES)
        form = rng.choice(("How is the weather in {}?", "Will it rain in {}?", "Is it cold in {}?"))
        return form.format(city), name, {"city": city}
    if name == "timer":
        minutes = rng.randint(10, 99)
        form = rng.choice(("Set a timer for {} minutes.", "Wake me in {} minutes.", "Call me in {} minutes."))
        return form.format(minutes), name, {"minutes": minutes}
    if name == "message":
        to, text = rng.choice(NAMES), " ".join(rng.sample(WORDS, rng.choice((1, 2))))
        form = rng.choice(("Tell {}: {}.", "Write to {}: {}."))
        return form.format(to, text), name, {"to": to, "text": text}
    if name == "train":
        start, end = rng.sample(CITIES, 2)
        form = rng.choice(("Book a train from {start} to {end}.", "I must go from {start} to {end}."))
        return form.format(start=start, end=end), name, {"start": start, "end": end}
    item = rng.choice(WORDS)
    form = rng.choice(("What is the price of the {}?", "How much is the {}?", "Is the {} expensive?"))
    return form.format(item), name, {"item": item}


def tool_call(rng: random.Random) -> Row:
    """Fill in the arguments of the right tool; about one row in seven offers a second tool that is not meant."""
    text, name, arguments = request(rng)
    offered = [name]
    if rng.random() < 0.15:
        offered.insert(rng.randint(0, 1), rng.choice([other for other in TOOLS if other != name]))
    return {"messages": [user(text), call(name, arguments)], "tools": [TOOLS[each] for each in offered]}


def tool_answer(rng: random.Random) -> Row:
    """Answer from what the tool said and what was asked."""
    if rng.random() < 0.5:
        city, degrees, sky = rng.choice(CITIES), rng.randint(10, 39), rng.choice(SKIES)
        question, name, arguments = f"How is the weather in {city}?", "weather", {"city": city}
        response, text = f"{sky}, {degrees} degrees", f"{degrees} degrees and {sky} in {city}."
    else:
        item, euros = rng.choice(WORDS), rng.randint(10, 99)
        question, name, arguments = f"What is the price of the {item}?", "price", {"item": item}
        response, text = f"{euros} euros", f"The {item} costs {euros} euros."
    result = {"role": "tool", "tool_call_id": "call_0", "name": name, "content": response}
    return {"messages": [user(question), call(name, arguments), result, answer(text)], "tools": [TOOLS[name]]}


# task name: (how a row is drawn, training rows, held-out rows)
TASKS: dict[str, tuple[Maker, int, int]] = {
    "pick": (pick, 700, 30),
    "reverse": (reverse, 700, 30),
    "sort": (sort, 700, 30),
    "add": (add, 600, 30),
    "json": (json_record, 700, 30),
    "tool_call": (tool_call, 900, 60),
    "tool_answer": (tool_answer, 700, 30),
}


# --- from rows to files -----------------------------------------------------------------------------------------------


def prompt_of(row: Row) -> str:
    """What a row asks: its turns up to the expected answer, without the tools, so that equal questions count as one."""
    return json.dumps(row["messages"][:-1], sort_keys=True)


def build(seed: int = SEED) -> tuple[list[Row], list[Row]]:
    """Draws (training rows, held-out rows), each shuffled; all prompts of both lists are distinct."""
    train: list[Row] = []
    heldout: list[Row] = []
    for task, (maker, train_rows, heldout_rows) in TASKS.items():
        rng = random.Random(f"{seed}/{task}")  # one stream per task: changing a task leaves the others alone
        rows: dict[str, Row] = {}
        while len(rows) < train_rows + heldout_rows:
            row = {"task": task, **maker(rng)}
            rows.setdefault(prompt_of(row), row)
        drawn = list(rows.values())
        heldout += drawn[:heldout_rows]
        train += drawn[heldout_rows:]
    shuffler = random.Random(f"{seed}/order")
    shuffler.shuffle(train)
    shuffler.shuffle(heldout)
    return train, heldout


def to_jsonl(rows: Iterable[Row]) -> bytes:
    """One compact ASCII JSON object a line."""
    return "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode("ascii")


def main(train_path: Path = TRAIN, heldout_path: Path = HELDOUT) -> None:
    """Writes both files and says what is in them."""
    train, heldout = build()
    for path, rows in ((train_path, train), (heldout_path, heldout)):
        data = to_jsonl(rows)
        path.write_bytes(data)
        print(f"{path.name}: {len(rows)} rows, {len(data):,} bytes")


if __name__ == "__main__":
    main()
