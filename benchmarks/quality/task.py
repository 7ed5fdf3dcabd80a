"""The benchmark's data: tldr pages to pretrain on, and a task of its own made of pages that are kept out of that.

The task: a request and a command whose first word is missing; the answer is that word, one of the commonest program
families. A page belongs to one split as a whole.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FAMILIES = 16
TEST_PAGES, VALID_PAGES = 20, 3  # of a hundred pages of these families
REQUEST = "which program? {request}: {rest}"


@dataclass(frozen=True)
class Record:
    page: str
    request: str
    command: str

    @property
    def family(self) -> str:
        return self.page.split("-")[0].split(" ")[0]


def read_records(data: Path, split: str) -> list[Record]:
    records = []
    with (data / f"tldr_{split}.jsonl").open(encoding="utf-8") as lines:
        for line in lines:
            _, user, answer = json.loads(line)
            page, _, request = user["content"].partition(": ")
            records.append(Record(page, request, answer["content"]))
    return records


def write_data(data: Path, out: Path) -> dict[str, int]:
    """Writes `pretrain/` and `task/`, train, valid and test each; returns how many records there are of each."""
    splits = {split: read_records(data, split) for split in ("train", "valid", "test")}
    counts = Counter(record.family for record in splits["train"])
    families = {family for family, _ in counts.most_common(FAMILIES)}
    files: dict[str, list[list[dict[str, str]]]] = {}
    for split, records in splits.items():
        for record in records:
            place = _task_split(record, families)
            if place != "test":
                files.setdefault(f"pretrain/{split}", []).append(
                    _messages(f"{record.page}: {record.request}", record.command)
                )
            if place is not None:
                files.setdefault(f"task/{place}", []).extend(_task(record))
    for name, rows in files.items():
        path = out / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return {name: len(rows) for name, rows in sorted(files.items())}


def _task_split(record: Record, families: set[str]) -> str | None:
    """Which split of the task a record belongs to, by its page; None if it belongs to none."""
    if record.family not in families:
        return None
    number = int(hashlib.sha256(record.page.encode()).hexdigest(), 16) % 100
    return "test" if number < TEST_PAGES else "valid" if number < TEST_PAGES + VALID_PAGES else "train"


def _task(record: Record) -> Iterator[list[dict[str, str]]]:
    first, _, rest = record.command.partition(" ")
    if first == record.family and rest:
        yield _messages(REQUEST.format(request=record.request, rest=rest), first)


def _messages(request: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": request}, {"role": "assistant", "content": answer}]
