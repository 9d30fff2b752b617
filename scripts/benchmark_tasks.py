"""Benchmarks as lists of questions: reading their files, and writing their prompts.

    tasks = read_tasks("data/eval/cmmlu.jsonl")            # a file; or a folder: all its files
    tasks = read_tasks("ceval/ceval-exam:*:val")           # of Hugging Face: owner/name:subset:split, * = all
    examples = few_shot(task, 5)                           # for each item five others of its subject
    context(item, "letter", task.language, examples[0])    # "…\\nA. …\\nB. …\\n答案："

A row is recognised by its columns, whatever the file (.jsonl, .json, .csv, .parquet):

    {"question", "choices": [texts], "answer": "A"}       the uniform format; id, benchmark and subject may be
                                                          there, the answer may be a number from 0 (MMLU)
    {"question", "answer": "…#### 18"}                    GSM8K: no choices, the answer is a number
    question,A,B,C,D,answer                               C-Eval, CMMLU, TMMLU+, A-CLUE; MMLU has no header
    {"question": {"stem", "choices": [{"label", "text"}]}, "answerKey"}               ARC, OpenBookQA
    {"question" or "question_stem", "choices": {"label", "text"}, "answerKey"}        the same in data sets
    {"goal", "sol1", "sol2", "label"}, {"context", "question", "answerA", …, "label"} PIQA, Social IQa
    {"ctx", "endings", "label"}                                                       HellaSwag

Every complaint is a `DataError` that says file, line, what is wrong and what to do.
"""

import csv
import io
import json
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from dataset.rows import DataError, RowError, iter_blocks, looks_like_hub_name, parse_line

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
SPLITS = ("test", "val", "validation", "dev", "train")  # the first that a folder has is taken
SPLIT = re.compile(rf"(?:^|[-_.])({'|'.join(SPLITS)})(?:-\d+-of-\d+)?$")
SHOWN = 20  # malformed rows that are named
QUESTION = {"en": "Question: ", "zh": "问题："}
ANSWER = {"en": "Answer:", "zh": "答案："}
NO_ANSWER = "it has no answer; test splits are often published without: take the validation split"


@dataclass
class Item:
    """One question. answer: number of the right choice from 0; without choices the text of a number."""

    id: str
    question: str
    choices: list[str]
    answer: int | str
    subject: str
    solution: str = ""  # of GSM8K: the way to the answer, for few-shot examples


@dataclass
class Task:
    """One benchmark. files: where its items are from; bad_rows: how many rows were left out."""

    name: str
    items: list[Item] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    bad_rows: int = 0

    @property
    def kind(self) -> str:
        return "choice" if self.items[0].choices else "generation"

    @property
    def language(self) -> str:
        """zh when most questions hold a Chinese character: one language for all prompts of a task."""
        chinese = sum(bool(re.search(r"[\u4e00-\u9fff]", item.question)) for item in self.items)
        return "zh" if 2 * chinese > len(self.items) else "en"


# ------------------------------------------------------------------------------------------------------------
# Files -> rows
# ------------------------------------------------------------------------------------------------------------


def read_tasks(source: str, skip_bad_rows: bool = False, complain=None) -> list[Task]:
    """The benchmarks in a file, a folder or a Hugging Face data set. Rows that name their benchmark are a
    task of that name; others are one task named after the file, folder or data set.

    Malformed rows: each is handed to `complain` as one sentence, then a DataError says how many there are;
    with `skip_bad_rows` they are counted and left out. Raises DataError for what cannot be read at all.
    """
    tasks: dict[str, Task] = {}
    complaints, default = [], default_name(source)
    for file, subject, number, row in source_rows(source):
        where = f"{file}:{number}"
        task = tasks.setdefault(str(row.get("benchmark") or default), Task(""))
        if file not in task.files:
            task.files.append(file)
        try:
            item = parse_row(row, where, subject)
            if task.items and bool(item.choices) != bool(task.items[0].choices):
                kind = "choices" if item.choices else "no choices"
                raise RowError(f"it has {kind}, unlike the rows before it: make these two files")
            task.items.append(item)
        except RowError as error:
            task.bad_rows += 1
            complaints.append(f"{where}: {error}")
    for name, task in tasks.items():
        task.name = name
    report(complaints, source, skip_bad_rows, complain)
    tasks = {name: task for name, task in tasks.items() if task.items}
    if not tasks:
        raise DataError(f"{source} holds no question that can be used")
    return list(tasks.values())


def report(complaints: list[str], source: str, skip: bool, complain):
    if len(complaints) == 1 and not skip:
        raise DataError(complaints[0])
    for sentence in complaints[:SHOWN] if complain else ():
        complain(sentence)
    if complaints and not skip:
        raise DataError(
            f"{source}: {len(complaints)} rows cannot be used, the first is {complaints[0]}; repair them, "
            "or leave them out with --skip_bad_rows 1"
        )


def default_name(source: str) -> str:
    path = Path(source)
    if not path.exists() and looks_like_hub_name(source):
        repo, subset, _ = hub_parts(source)
        return repo.split("/")[1] + ("" if subset in (None, "*") else f"_{subset}")
    stem = path.stem if path.is_file() else path.resolve().name
    return SPLIT.sub("", stem) or path.resolve().parent.name


def source_rows(source: str) -> Iterator[tuple[str, str, int, dict]]:
    """(file, subject if a row does not say, line, row)."""
    path = Path(source)
    if not path.exists() and looks_like_hub_name(source):
        yield from hub_rows(source)
        return
    for file in files_of(path):
        subject = SPLIT.sub("", file.stem) or file.resolve().parent.name
        count = 0
        for number, row in csv_rows(file) if file.suffix.lower() == ".csv" else json_rows(file):
            count += 1
            yield str(file), subject, number, row
        if not count:
            raise DataError(f"{file} holds no rows")


def files_of(path: Path) -> list[Path]:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise DataError(f"{path} is none of {', '.join(SUFFIXES)}: convert it, or rename it")
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path} does not exist: give a {', '.join(SUFFIXES)} file, a folder of such files, or a Hugging "
            "Face data set as owner/name:subset:split"
        )
    files = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    if not files:
        folders = ", ".join(sorted(p.name for p in path.iterdir() if p.is_dir())[:5])
        hint = f"; it has the folders {folders}: give one of them" if folders else ""
        raise DataError(f"{path} holds no {', '.join(SUFFIXES)} file{hint}")
    splits = {p: match[1] for p in files if (match := SPLIT.search(p.stem))}
    if len(splits) < len(files):
        return files
    first = min(splits.values(), key=SPLITS.index)
    return [p for p in files if splits[p] == first]


def json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    for first, block in iter_blocks(file):
        for number, line in enumerate(block.split(b"\n"), first):
            if line.strip():
                try:
                    yield number, parse_line(line)
                except RowError as error:
                    yield number, {"": str(error)}


def csv_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """With a header that names the question, or as MMLU has them: question, choices, letter."""
    data = file.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise DataError(
            f"{file}:{line}: not UTF-8; convert the file, e.g. `iconv -f GB18030 -t UTF-8 IN > OUT`"
        ) from None
    header, line, reader = None, 1, csv.reader(io.StringIO(text, newline=""))
    while True:
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{file}:{line}: not CSV ({error})") from None
        if cells is None:
            return
        number, line = line, reader.line_num + 1
        if not any(cells):
            continue
        if header is None:
            names = [cell.strip().lower() for cell in cells]
            if "question" in names:
                header = names
                continue
            if len(cells) < 4 or cells[-1].strip() not in LETTERS[: len(cells) - 2]:
                raise DataError(
                    f"{file}:{number}: the first line must name the columns (question, A, B, C, D, answer), "
                    "or be a question, its choices and a letter as in MMLU"
                )
            header = ["question", *LETTERS[: len(cells) - 2].lower(), "answer"]
        if len(cells) != len(header):
            remedy = "is a quote not closed, or a comma not between quotes?"
            yield number, {"": f"{len(cells)} cells where {len(header)} are expected; {remedy}"}
        else:
            yield number, dict(zip(header, cells))


def hub_parts(source: str) -> tuple[str, str | None, str]:
    """owner/name, owner/name:split or owner/name:subset:split; * = all subsets."""
    repo, *rest = source.split(":")
    return repo, rest[0] if len(rest) == 2 else None, rest[-1] if rest else "test"


def hub_rows(source: str) -> Iterator[tuple[str, str, int, dict]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: a Hugging Face data set needs `pip install datasets`") from None
    repo, subset, split = hub_parts(source)
    try:
        subsets = datasets.get_dataset_config_names(repo) if subset == "*" else [subset]
        parts = [(name, datasets.load_dataset(repo, name, split=split)) for name in subsets]
    except Exception as error:  # the hub client raises many types, all of them about this one name
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source}: no such file, and this data set cannot be fetched from Hugging Face ({reason}); "
            "without a network give a local file"
        ) from None
    for name, rows in parts:
        place = f"{repo}:{name}:{split}" if name else f"{repo}:{split}"
        for number, row in enumerate(rows, 1):
            yield place, name or repo.split("/")[1], number, row


# ------------------------------------------------------------------------------------------------------------
# Row -> question
# ------------------------------------------------------------------------------------------------------------


def parse_row(row: dict, where: str, subject: str) -> Item:
    """Recognise a row by its columns. Raises RowError."""
    if "" in row and len(row) == 1:  # what could not be read at all
        raise RowError(row[""])
    row = {str(key).strip().lower(): value for key, value in row.items()}
    question, choices, labels = shape_of(row)
    question = text_of(question, "the question")
    answer = next((row[key] for key in ("answer", "answerkey", "label") if row.get(key) is not None), None)
    if answer is None or (isinstance(answer, str) and not answer.strip()):
        raise RowError(NO_ANSWER)
    subject = str(row.get("subject") or row.get("category") or subject)
    item = Item(str(row.get("id") or where), question, choices, "", subject)
    if not choices:
        item.answer, item.solution = number_of(answer), str(answer).strip()
        if "####" not in item.solution:
            item.solution = f"#### {item.answer}"
    else:
        item.answer = index_of(answer, labels)
    return item


def shape_of(row: dict) -> tuple:
    """(question, texts of the choices, labels that an answer may be); no choices for a number."""
    question = next((row[k] for k in ("question", "question_stem", "goal", "ctx") if k in row), None)
    choices = row.get("choices", row.get("endings"))
    if isinstance(choices, str):  # a cell of a CSV file
        try:
            choices = json.loads(choices)
        except ValueError:
            raise RowError('"choices" is a text that is no JSON list, such as ["yes", "no"]') from None
    if isinstance(question, dict):
        question, choices = question.get("stem"), question.get("choices", choices)
    if question is None:
        found = ", ".join(map(repr, row)) or "no keys"
        raise RowError(f'the key "question" is missing; this row has {found}')
    labels = None
    if "context" in row and "answera" in row:  # Social IQa
        question = f"{text_of(row['context'], 'the context')} {text_of(question, 'the question')}"
        choices, labels = [row[f"answer{c}"] for c in "abc" if f"answer{c}" in row], ["1", "2", "3"]
    elif "sol1" in row:
        choices, labels = [row["sol1"], row.get("sol2")], ["0", "1"]
    elif "endings" in row:
        labels = [str(i) for i in range(len(choices or ()))]
    elif choices is None and "a" in row:
        letters = [c for c in LETTERS if c.lower() in row]
        if "".join(letters) != LETTERS[: len(letters)]:
            raise RowError(f"its choices are {', '.join(letters)}: one is missing between them")
        choices = [row[c.lower()] for c in letters]
        while len(choices) > 4 and choices[-1] in (None, ""):  # E, F, ... that only some questions use
            choices.pop()
    elif isinstance(choices, dict):
        choices, labels = choices.get("text"), choices.get("label")
    elif isinstance(choices, list) and choices and isinstance(choices[0], dict):
        if not all(isinstance(c, dict) and {"text", "label"} <= set(c) for c in choices):
            raise RowError('a choice lacks "text" or "label"')
        choices, labels = [c["text"] for c in choices], [c["label"] for c in choices]
    if choices is None:
        return question, [], []
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        count = f"has {len(choices)} entries" if isinstance(choices, list) else "is no list"
        raise RowError(f'"choices" must be a list of 2 to {len(LETTERS)} texts, this one {count}')
    choices = [text_of(choice, f"choice {LETTERS[i]}") for i, choice in enumerate(choices)]
    if labels is not None and (not isinstance(labels, list) or len(labels) != len(choices)):
        raise RowError(f"{len(choices)} choices need as many labels")
    return question, choices, [str(label).strip() for label in labels or LETTERS[: len(choices)]]


def text_of(value, what: str) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise RowError(f"{what} must be a text, this is {'null' if value is None else type(value).__name__}")
    if not value.strip():
        raise RowError(f"{what} is empty")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowError(f"{what} holds half a surrogate pair: broken text") from None
    return value


def index_of(answer, labels: list[str]) -> int:
    """Number of the right choice from its label, or from 0 where labels are letters."""
    if isinstance(answer, str | int) and not isinstance(answer, bool):
        label = str(answer).strip()
        if label in labels:
            return labels.index(label)
        if label.upper() in labels:
            return labels.index(label.upper())
        if isinstance(answer, int) and 0 <= answer < len(labels):
            return answer
    raise RowError(f"the answer is {answer!r}, which is none of {', '.join(labels)}")


def number_of(answer) -> str:
    """The number that a row without choices asks for. Raises RowError."""
    number = normal_number(str(answer).split("####")[-1])
    if number is None or isinstance(answer, bool):
        raise RowError(
            f"without choices the answer must be a number or end with '#### number', this is {answer!r:.60}"
        )
    return number


# ------------------------------------------------------------------------------------------------------------
# Numbers in answers
# ------------------------------------------------------------------------------------------------------------


def normal_number(text: str) -> str | None:
    """'$1,234.50.' -> '1234.5'; None for what is no number."""
    plain = text.strip().strip("$¥€%").strip().rstrip(".").replace(",", "").replace("，", "").replace("$", "")
    try:
        number = Decimal(plain)
    except InvalidOperation:
        return None
    return f"{number.normalize():f}" if number.is_finite() else None


def answered_number(text: str) -> str | None:
    """The number behind the first ####, else the last number of an answer, in plain form."""
    marked = re.search(r"####\s*\$?(-?[\d,]*\.?\d+)", text)
    found = [marked[1]] if marked else re.findall(r"-?\d[\d,]*(?:\.\d+)?|-?\.\d+", text)
    return normal_number(found[-1]) if found else None


# ------------------------------------------------------------------------------------------------------------
# Prompts
# ------------------------------------------------------------------------------------------------------------


def few_shot(task: Task, count: int, seed: int = 0, pool: list[Item] | None = None) -> list[list[Item]]:
    """Examples for every item: `count` items of its subject.

    pool: where to take them from, the first ones of the subject in their order. Without it they are other
    items of the task: a shuffle of the subject by (seed, subject) decides, the first `count` are everybody's
    examples, and these themselves get the next ones. An item, or one with the same question, is never its own
    example. Raises DataError where there are too few.
    """
    if not count:
        return [[] for _ in task.items]
    subjects: dict[str, list[Item]] = {}
    for item in task.items if pool is None else pool:
        subjects.setdefault(item.subject, []).append(item)
    if pool is None:
        for subject, items in subjects.items():
            random.Random(f"{seed}:{subject}").shuffle(items)
    examples = []
    for item in task.items:
        items = subjects.get(item.subject) or pool or []
        first = items[:count]
        if any(item.question == other.question for other in first):
            first = items[count:] + first
        first = [other for other in first if other.question != item.question][:count]
        if len(first) < count:
            raise DataError(
                f"{task.name}: subject {item.subject} has {len(first)} examples for item {item.id}, not "
                f"{count}: give a smaller --fewshot, or examples with --fewshot_path"
            )
        examples.append(first)
    return examples


def question_text(item: Item, rule: str, language: str) -> str:
    """What is asked, up to where the answer begins. rule letter: with the choices printed."""
    if rule != "letter":
        return f"{QUESTION[language]}{item.question}\n{ANSWER[language]}"
    lines = [
        item.question.strip(),
        *(f"{c}. {text}" for c, text in zip(LETTERS, item.choices)),
        ANSWER[language],
    ]
    return "\n".join(lines)


def answers(item: Item, rule: str) -> list[str]:
    """The texts whose likelihoods are compared."""
    return list(LETTERS[: len(item.choices)]) if rule == "letter" else item.choices


def context(item: Item, rule: str, language: str, examples: list[Item]) -> str:
    """Examples with their answers, then the question."""
    solved = [
        f"{question_text(e, rule, language)} {answers(e, rule)[e.answer] if e.choices else e.solution}"
        for e in examples
    ]
    return "\n\n".join([*solved, question_text(item, rule, language)])
