"""Text to token ids, and which of them are targets: one place for every stage.

    ids, mask = render_conversation(tokenizer, messages)      # mask 1: the model must learn to write it
    train, val = load_pretrain("dataset/pretrain_hq.jsonl", tokenizer, max_seq_len=340)
    train, val = load_sft("dataset/sft_mini_512.jsonl", tokenizer, max_seq_len=340)
    batch = train.batch([0, 7, 3])                            # input_ids, labels, position_ids, each (3, 340)

**Answer tokens.** The chat template itself says where an answer starts and ends (`{% generation %}`). It is
rendered once per *shape* of conversation with placeholders where the texts go; the texts are then tokenized
between its special tokens. Nothing is ever searched in ids, and text of a user, a tool or a system message
can not become a special token, whatever it contains. (An assistant's own `<tool_call>` tags do: that is how
older files write calls.)

**Seams.** Text is tokenized in the stretches between special tokens, cut where the answer starts. At
inference the prompt ends at the same cut, so the model continues exactly what it saw in training.
"""

import functools
import hashlib
import json
import random
import re
import threading
import weakref
from pathlib import Path

import numpy as np

from dataset import packing
from dataset.rows import DataError, RowError, canonical

__all__ = [
    "DataError",
    "PackedDataset",
    "encode_document",
    "encode_prompt",
    "load_pretrain",
    "load_sft",
    "render_conversation",
]

IGNORE = -100  # label of a position that is not a target (torch's cross-entropy default)

# Placeholders in a rendered template; private-use characters, and the texts themselves are never rendered.
SLOT, SLOT_END, ANSWER, ANSWER_END = "\ue000", "\ue001", "\ue002", "\ue003"
TOOL_CALL_TAGS = ("<tool_call>", "</tool_call>")

SYSTEM_PROMPTS = (
    "你是一个乐于助人的助手。",
    "你是一个知识丰富的人工智能助手，请准确、清楚地回答问题。",
    "请用简洁的语言回答用户。",
    "你是一名耐心的老师，善于把复杂的事情讲明白。",
    "你是一个可靠的中文助手，不知道的就说不知道。",
    "You are a helpful assistant.",
    "You are a careful assistant who gives correct and clear answers.",
    "Answer the user briefly and to the point.",
    "You are a patient teacher who explains things simply.",
    "You are an honest assistant: say so when you do not know.",
)


# ------------------------------------------------------------------------------------------------------------
# Text <-> ids


class TextEncoder:
    """A tokenizer and its chat template without `transformers`, so that worker processes start in a
    moment."""

    def __init__(self, tokenizer_json, chat_template, bos, eos, pad):
        from tokenizers import Tokenizer

        self.spec = (tokenizer_json, chat_template, bos, eos, pad)
        self.bos, self.eos, self.pad = bos, eos, pad
        self.chat_template = chat_template
        settings = json.loads(tokenizer_json)
        self.special_ids = {token["content"]: token["id"] for token in settings["added_tokens"]}
        self.vocab_size = 1 + max([*settings["model"]["vocab"].values(), *self.special_ids.values()])
        tags = [tag for tag in TOOL_CALL_TAGS if tag in self.special_ids]
        self.tag_pattern = re.compile("(" + "|".join(map(re.escape, tags)) + ")") if tags else None
        # Without added tokens no text can become one; ids of ordinary text are the same.
        settings.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self.plain = Tokenizer.from_str(json.dumps(settings))
        self.skeletons = {}

    @classmethod
    def of(cls, tokenizer):
        """The encoder of a transformers tokenizer, made once per tokenizer and template."""
        if isinstance(tokenizer, cls):
            return tokenizer
        known = _encoders.get(tokenizer)
        template = tokenizer.chat_template
        if known is None or known.chat_template != template:
            known = cls(
                tokenizer.backend_tokenizer.to_str(),
                template,
                tokenizer.bos_token_id,
                tokenizer.eos_token_id,
                tokenizer.pad_token_id,
            )
            _encoders[tokenizer] = known
        return known

    @classmethod
    def from_folder(cls, folder):
        """From tokenizer.json, tokenizer_config.json and chat_template.jinja, without importing
        transformers."""
        folder = Path(folder)
        try:
            tokenizer_json = (folder / "tokenizer.json").read_text(encoding="utf-8")
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"{folder} is not a tokenizer folder: {error}") from None
        ids = {token["content"]: token["id"] for token in json.loads(tokenizer_json)["added_tokens"]}
        names = [config.get(f"{role}_token") for role in ("bos", "eos", "pad")]
        names = [name["content"] if isinstance(name, dict) else name for name in names]
        template = folder / "chat_template.jinja"
        template = template.read_text(encoding="utf-8") if template.exists() else config.get("chat_template")
        return cls(tokenizer_json, template, *(ids.get(name) for name in names))

    def fingerprint(self, with_template):
        """Hash of everything that decides the ids of a text."""
        template = self.chat_template if with_template else None
        # as the tokenizers library writes it, so that different spellings of one tokenizer.json are equal
        content = [self.plain.to_str(), self.special_ids, self.bos, self.eos, template]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def token_bytes(self):
        """(V,) UTF-8 bytes of each token; 0 for special tokens. A byte-level token has one character per
        byte."""
        return np.frombuffer(_token_bytes(self.spec[0]), np.uint8)

    def token_texts(self):
        """The UTF-8 bytes of every token, as a list by id; of special tokens their names."""
        vocab = json.loads(self.spec[0])["model"]["vocab"]
        texts = [b""] * self.vocab_size
        for token, number in vocab.items():
            if all(c in _BYTE_OF for c in token):
                texts[number] = bytes(_BYTE_OF[c] for c in token)
        for name, number in self.special_ids.items():
            texts[number] = name.encode()
        return texts

    # -- documents

    def encode_documents(self, texts):
        """bos + text + eos for each text, as int lists."""
        return [[self.bos, *ids, self.eos] for ids in self.encode_texts(texts)]

    # -- conversations

    def encode_conversations(self, conversations):
        """`(ids, mask)` int lists of each canonical `(messages, tools)` (see `rows.canonical`)."""
        runs_of_each = [list(self.runs(messages, tools)) for messages, tools in conversations]
        encoded = iter(
            self.encode_texts([run for runs in runs_of_each for run, _ in runs if isinstance(run, str)])
        )
        result = []
        for runs in runs_of_each:
            ids, mask = [], []
            for run, is_answer in runs:
                if isinstance(run, str):
                    piece = next(encoded)
                    ids += piece
                    mask += [is_answer] * len(piece)
                else:
                    ids.append(run)
                    mask.append(is_answer)
            result.append((ids, mask))
        return result

    def encode_pair(self, chosen, rejected):
        """`(prompt ids, ids of the chosen answer, ids of the rejected one)` of two canonical `(messages,
        tools)` that differ in their last message only.

        The prompt is tokenized once, so it is the same for both. If one answer thinks, both begin behind
        `<think>`: the other then closes it at once, in its answer.
        """
        thinking = any(messages[-1].get("reasoning_content") for messages, _ in (chosen, rejected))
        prompt = list(self.runs(chosen[0][:-1], chosen[1], True, thinking))
        answers = []
        for messages, tools in (chosen, rejected):
            runs = list(self.runs(messages, tools))
            first = max(i for i, (_, is_answer) in enumerate(runs) if not is_answer and i < len(runs) - 1) + 1
            runs = [run for run, is_answer in runs[first:] if is_answer]
            if thinking and not messages[-1].get("reasoning_content"):
                text = [runs.pop(0)] if isinstance(runs[0], str) else []
                runs = ["\n", self.special_ids["</think>"], "".join(["\n\n", *text]), *runs]
            answers.append(runs)
        encoded = self.encode_texts(
            [r for runs in ([r for r, _ in prompt], *answers) for r in runs if isinstance(r, str)]
        )
        encoded = iter(encoded)
        return [
            [i for run in runs for i in (next(encoded) if isinstance(run, str) else [run])]
            for runs in ([r for r, _ in prompt], *answers)
        ]

    def runs(self, messages, tools, generation_prompt=False, open_thinking=False):
        """`(text or special id, is_answer)` in order. Adjacent text with equal is_answer is one run."""
        skeleton, slots = self._skeleton(messages, tools, generation_prompt, open_thinking)
        for piece, is_answer in skeleton:
            if isinstance(piece, int):
                yield piece, is_answer
            else:
                text = "".join(slots[part] if isinstance(part, int) else part for part in piece)
                if is_answer and self.tag_pattern and "tool_call>" in text:
                    for part in self.tag_pattern.split(text):
                        if part:
                            yield (
                                self.special_ids.get(part, part) if part in TOOL_CALL_TAGS else part,
                                is_answer,
                            )
                elif text:
                    yield text, is_answer

    def text(self, messages, tools=None, generation_prompt=False, open_thinking=False):
        """The rendered text, put together from runs (a test compares it with the template's own)."""
        names = {number: name for name, number in self.special_ids.items()}
        runs = self.runs(messages, tools, generation_prompt, open_thinking)
        return "".join(run if isinstance(run, str) else names[run] for run, _ in runs)

    def encode_texts(self, texts):
        """Ids of each text. Equal texts (role names, tool lists) are encoded once and share one list."""
        unique = list(dict.fromkeys(texts))
        encoded = self.plain.encode_batch_fast(unique, add_special_tokens=False)
        ids = {text: encoding.ids for text, encoding in zip(unique, encoded)}
        return [ids[text] for text in texts]

    def _skeleton(self, messages, tools, generation_prompt, open_thinking):
        """The template rendered for this shape of conversation, and the texts that go into its slots."""
        slots, shape, stubs = [], [], []

        def slot(text):
            slots.append(text)
            return f"{SLOT}{len(slots) - 1}{SLOT_END}"

        tool_stubs = [slot(json.dumps(tool, ensure_ascii=False)) for tool in tools] if tools else None
        for message in messages:
            stub = {
                "role": message["role"],
                "content": slot(message["content"]) if message["content"] else "",
            }
            if message.get("reasoning_content"):
                stub["reasoning_content"] = slot(message["reasoning_content"])
            calls = message.get("tool_calls", ())
            if calls:
                stub["tool_calls"] = [
                    {"name": slot(call["name"]), "arguments": slot(call["arguments"])} for call in calls
                ]
            stubs.append(stub)
            shape.append((stub["role"], bool(stub["content"]), "reasoning_content" in stub, len(calls)))
        key = (tuple(shape), len(tools or ()), generation_prompt, open_thinking)
        with _lock:
            skeleton = self.skeletons.get(key)
            if skeleton is None:
                skeleton = self._compile(stubs, tool_stubs, generation_prompt, open_thinking)
                if sum(len(shape) for shape, *_ in self.skeletons) > 16_384:  # messages, 1.6 KB each
                    self.skeletons.clear()
                self.skeletons[key] = skeleton
        return skeleton, slots

    def _compile(self, stubs, tool_stubs, generation_prompt, open_thinking):
        """Cut the rendered template into `(special id or list of text and slot numbers, is_answer)`."""
        if not self.chat_template:
            raise DataError("this tokenizer has no chat template, so conversations can not be rendered")
        text = _template(self.chat_template).render(
            messages=stubs,
            tools=tool_stubs,
            add_generation_prompt=generation_prompt,
            open_thinking=open_thinking,
            enable_thinking=open_thinking,
        )
        if ANSWER not in text and any(stub["role"] == "assistant" for stub in stubs):
            raise DataError(
                "the chat template does not mark answers: wrap them in {% generation %}...{% endgeneration %}"
            )
        specials = "|".join(map(re.escape, sorted(self.special_ids, key=len, reverse=True)))
        # a tool is written as JSON, so its placeholder stands between quotes
        cuts = re.compile(f'"?{SLOT}(\\d+){SLOT_END}"?|({specials}|{ANSWER}|{ANSWER_END})')
        num_tools = len(tool_stubs or ())
        skeleton, run, is_answer, position = [], [], 0, 0

        def flush():
            if run:
                skeleton.append((run.copy(), is_answer))
                run.clear()

        for match in cuts.finditer(text):
            number, special = match.groups()
            start, end = match.span()
            if (
                number is not None and int(number) >= num_tools
            ):  # quotes around other texts are the template's
                start += match[0].startswith('"')
                end -= match[0].endswith('"')
            if start > position:
                run.append(text[position:start])
            position = end
            if number is not None:
                run.append(int(number))
                continue
            flush()
            if special == ANSWER:
                is_answer = 1
            elif special == ANSWER_END:
                is_answer = 0
            else:
                skeleton.append((self.special_ids[special], is_answer))
        if position < len(text):
            run.append(text[position:])
        flush()
        return skeleton


_encoders = weakref.WeakKeyDictionary()
_lock = threading.Lock()  # a server encodes in several threads

# Byte-level BPE writes every byte as a visible character: itself where it is one, else one from U+0100 on.
_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_HIDDEN = [byte for byte in range(256) if byte not in _VISIBLE]
_BYTE_OF = {chr(b): b for b in _VISIBLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}


@functools.lru_cache(maxsize=4)
def _template(source):
    """The jinja template in the environment `transformers` uses; an answer comes out between ANSWER marks."""
    import jinja2.ext
    import jinja2.nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        tags = {"generation"}

        def parse(self, parser):
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

        def _mark(self, caller):
            return ANSWER + caller() + ANSWER_END

    def raise_exception(message):
        raise RowError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.globals["raise_exception"] = raise_exception
    return environment.from_string(source)


@functools.lru_cache(maxsize=4)
def _token_bytes(tokenizer_json):
    settings = json.loads(tokenizer_json)
    special = {token["id"] for token in settings["added_tokens"]}
    vocab = settings["model"]["vocab"]
    lengths = np.zeros(1 + max([*vocab.values(), *special]), np.uint8)
    for token, number in vocab.items():
        if number not in special:
            lengths[number] = min(len(token), 255)
    return lengths.tobytes()


def encode_document(tokenizer, text):
    """bos + text + eos, as a list of ids. Text never produces special ids."""
    encoder = TextEncoder.of(tokenizer)
    return [encoder.bos, *encoder.plain.encode(text, add_special_tokens=False).ids, encoder.eos]


def render_conversation(tokenizer, messages, tools=None):
    """`(ids, mask)` of a conversation, lists of int. mask is 1 exactly on what the assistant writes: from
    behind the generation prompt through `<|im_end|>`. This is THE function that finds answer tokens.

    `messages` as in the files (`reasoning_content`, `tools`/`functions` on the system message, `tool_calls`
    as list or JSON text); raises DataError if they are not.
    """
    encoder = TextEncoder.of(tokenizer)
    ids, mask = [], []
    for run, is_answer in encoder.runs(*_canonical(messages, tools)):
        # one by one: this must not start the tokenizer's thread pool in a process that may fork later
        piece = encoder.plain.encode(run, add_special_tokens=False).ids if isinstance(run, str) else [run]
        ids += piece
        mask += [is_answer] * len(piece)
    return ids, mask


def encode_prompt(tokenizer, messages, tools=None, open_thinking=False):
    """Ids of the conversation up to and including the generation prompt: what the model continues at
    inference. They equal the first ids of `render_conversation` of the same messages plus an answer."""
    encoder = TextEncoder.of(tokenizer)
    ids = []
    for run, _ in encoder.runs(
        *_canonical(messages, tools), generation_prompt=True, open_thinking=open_thinking
    ):
        ids += encoder.plain.encode(run, add_special_tokens=False).ids if isinstance(run, str) else [run]
    return ids


def _canonical(messages, tools):
    try:
        return canonical(messages, tools)
    except RowError as error:
        raise DataError(str(error)) from None


def with_system_prompt(messages, tools, ratio, seed, index):
    """Give `ratio` of the conversations without a system message one of SYSTEM_PROMPTS, as a function of
    (seed, index) only. Conversations with tools stay as they are."""
    if tools or messages[0]["role"] == "system":
        return messages
    draw = random.Random(f"{seed}:{index}")
    if draw.random() >= ratio:
        return messages
    return [{"role": "system", "content": draw.choice(SYSTEM_PROMPTS)}, *messages]


# ------------------------------------------------------------------------------------------------------------
# Rows


class PackedDataset:
    """Rows of `max_seq_len` tokens, each made of whole pieces (documents, or parts of long ones).

    `dataset[i]` -> input_ids, labels, position_ids, int64 (T,). Labels are not shifted (the model shifts):
    -100 on prompts, padding, and the first token of every piece, which nothing precedes. position_ids restart
    at 0 with every piece, and once more where padding starts; that is what keeps pieces from attending to
    each other.
    `dataset.batch(rows)` -> the same, stacked (B, T).
    """

    unit = "rows"

    def __init__(self, caches, starts, lengths, row_offsets, max_seq_len, pad_id, token_bytes, report):
        self.caches = caches
        self.bases = np.cumsum(
            [0] + [cache.num_tokens for cache in caches]
        )  # global position of each cache's tokens
        self.starts = np.asarray(starts, np.int64)  # (P,) global position of each piece, in row order
        self.lengths = np.asarray(lengths, np.int32)  # (P,)
        self.row_offsets = np.asarray(row_offsets, np.int64)  # (R+1,) pieces of row r: [r], [r+1]
        self.max_seq_len = max_seq_len
        self.pad_id = pad_id
        self.token_bytes = token_bytes
        self.annotate = None  # a function of a micro-batch (a dict of tensors) that returns more of them
        self._report = report

    def __len__(self):
        return len(self.row_offsets) - 1

    def __getitem__(self, row):
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return {name: tensor[0] for name, tensor in self.batch([row % len(self)]).items()}

    def batch(self, rows):
        """input_ids, labels, position_ids of the given rows: int64 tensors (B, T)."""
        import torch

        return {name: torch.from_numpy(array) for name, array in self.arrays(rows).items()}

    def collate(self, rows, size):
        """The rows as one micro-batch of `size` rows: all have the same shape (a compiled step is compiled
        once), so the last step of a run is filled up with rows of padding, which hold no target and count
        nowhere."""
        batch = self.batch(rows or [0])
        missing = size - len(rows)
        if missing:
            import torch

            width = self.max_seq_len
            empty = {
                "input_ids": torch.full((missing, width), self.pad_id, dtype=torch.int64),
                "labels": torch.full((missing, width), IGNORE, dtype=torch.int64),
                "position_ids": torch.arange(width).repeat(missing, 1),
            }
            batch = {name: torch.cat([batch[name][: len(rows)], empty[name]]) for name in batch}
        return batch if self.annotate is None else batch | self.annotate(batch)

    def arrays(self, rows):
        """`batch` as numpy arrays."""
        B, T = len(rows), self.max_seq_len
        source, within, target, row_lengths = self._gather_plan(np.asarray(rows, np.int64))
        ids, is_target = self._tokens(source)
        is_target &= within > 0
        input_ids = np.full(B * T, self.pad_id, np.int64)
        labels = np.full(B * T, IGNORE, np.int64)
        position_ids = np.tile(np.arange(T), B) - np.repeat(
            row_lengths, T
        )  # right for padding, the rest is set now
        input_ids[target] = ids
        labels[target] = np.where(is_target, ids, IGNORE)
        position_ids[target] = within
        return {
            "input_ids": input_ids.reshape(B, T),
            "labels": labels.reshape(B, T),
            "position_ids": position_ids.reshape(B, T),
        }

    def _gather_plan(self, rows):
        """For every token of these rows, one after the other: where it lies in the caches, its place in its
        piece, its place in the flat (B*T,) output; and the number of tokens of each row (B,)."""
        first, last = self.row_offsets[rows], self.row_offsets[rows + 1]
        counts = last - first
        piece_row = np.repeat(np.arange(len(rows)), counts)
        pieces = _ranges(first, counts)
        lengths = self.lengths[pieces].astype(np.int64)
        ends = np.cumsum(lengths)
        row_lengths = np.bincount(piece_row, weights=lengths, minlength=len(rows)).astype(np.int64)
        row_starts = np.cumsum(row_lengths) - row_lengths
        place = ends - lengths - row_starts[piece_row] + piece_row * self.max_seq_len
        within = _ranges(np.zeros(len(lengths), np.int64), lengths)
        return (
            np.repeat(self.starts[pieces], lengths) + within,
            within,
            np.repeat(place, lengths) + within,
            row_lengths,
        )

    def _tokens(self, positions):
        """Ids (int64) and whether each may be a target, at global positions."""
        if len(self.caches) == 1:
            return self.caches[0].tokens_at(positions)
        ids, is_target = np.empty(len(positions), np.int64), np.empty(len(positions), bool)
        owner = np.searchsorted(self.bases, positions, side="right") - 1
        for number in np.unique(owner):
            mine = owner == number
            ids[mine], is_target[mine] = self.caches[number].tokens_at(positions[mine] - self.bases[number])
        return ids, is_target

    def _target_ids(self, rows):
        source, within, _, _ = self._gather_plan(np.asarray(rows, np.int64))
        ids, is_target = self._tokens(source)
        return ids[is_target & (within > 0)]

    def row_bytes(self, row):
        """UTF-8 bytes of the text of this row's targets (special tokens count 0)."""
        return int(self.token_bytes[self._target_ids([row])].sum(dtype=np.int64))

    @property
    def tokens_per_row(self):
        return self.max_seq_len

    def fingerprint(self):
        """Hash of what the rows are made of: the documents' content and how they were cut and packed."""
        digest = hashlib.sha256()
        arrays = (self.starts, self.lengths, self.row_offsets, *(cache.hashes for cache in self.caches))
        for array in arrays:
            digest.update(np.ascontiguousarray(array).view(np.uint8).data)
        for cache in self.caches:  # the hashes above are of questions alone, in a file of conversations
            digest.update(cache.meta["key"]["content"].encode())
        return digest.hexdigest()[:16]

    @functools.cached_property
    def num_tokens(self):
        """Tokens in all rows, without padding."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def length_of_pieces(self):
        """The length L such that a hundredth of all tokens lies in pieces at least so long: what a model that
        learns from these rows can be said to know. (The very longest may be one of a million.)"""
        longest_first = np.sort(self.lengths)[::-1]
        before = np.cumsum(longest_first, dtype=np.int64)
        return int(longest_first[np.searchsorted(before, self.num_tokens / 100)])

    @functools.cached_property
    def num_targets(self):
        return int(self.row_targets.sum())

    @functools.cached_property
    def num_bytes(self):
        """UTF-8 bytes of the text of all targets: with the summed loss in nats, bits per byte = loss/(bytes
        ln 2)."""
        return sum(
            int(
                self.token_bytes[self._target_ids(range(start, min(start + 1024, len(self))))].sum(
                    dtype=np.int64
                )
            )
            for start in range(0, len(self), 1024)
        )

    @functools.cached_property
    def row_targets(self):
        """(R,) targets of each row."""
        per_piece = np.empty(len(self.lengths), np.int64)
        owner = np.searchsorted(self.bases, self.starts, side="right") - 1
        for number, cache in enumerate(self.caches):
            mine = owner == number
            per_piece[mine] = cache.count_targets(self.starts[mine] - self.bases[number], self.lengths[mine])
        sums = np.concatenate([[0], np.cumsum(per_piece)])
        return sums[self.row_offsets[1:]] - sums[self.row_offsets[:-1]]

    def thinned(self, num_rows):
        """The same data with evenly spaced rows only, at most `num_rows` of them and at least one."""
        if num_rows >= len(self):
            return self
        rows = np.linspace(0, len(self) - 1, max(1, num_rows)).round().astype(np.int64)
        counts = self.row_offsets[rows + 1] - self.row_offsets[rows]
        pieces = _ranges(self.row_offsets[rows], counts)
        offsets = np.concatenate([[0], np.cumsum(counts)])
        same = (self.max_seq_len, self.pad_id, self.token_bytes, self._report)
        return PackedDataset(self.caches, self.starts[pieces], self.lengths[pieces], offsets, *same)

    def report(self):
        """What became of the data: counts, and shares in percent."""
        slots = len(self) * self.max_seq_len
        source = self._report["source_tokens"]
        return {
            "rows": len(self),
            "max_seq_len": self.max_seq_len,
            **self._report,
            "tokens": self.num_tokens,
            "kept_percent": 100 * self.num_tokens / max(source, 1),
            "padding_percent": 100 * (1 - self.num_tokens / max(slots, 1)),
            "targets": self.num_targets,
            "kept_target_percent": 100 * self.num_targets / max(self._report["source_targets"], 1),
            "target_percent": 100 * self.num_targets / max(slots, 1),
            "rows_without_targets": int((self.row_targets == 0).sum()),
        }

    def summary(self):
        """`report` in one line."""
        report = self.report()
        line = (
            f"{report['documents']:,} documents -> {report['rows']:,} rows of {self.max_seq_len}: "
            f"{report['tokens']:,} tokens ({report['kept_percent']:.1f}% kept, "
            f"{report['kept_target_percent']:.1f}% of the targets), "
            f"{report['padding_percent']:.1f}% padding, {report['target_percent']:.1f}% targets, "
            f"{report['rows_without_targets']} rows without targets"
        )
        if report["split_documents"]:
            line += f", {report['split_documents']:,} long documents split"
        if report["cut_documents"] or report["dropped_documents"]:
            line += (
                f"; {report['cut_documents']:,} conversations cut after the last answer that fits, "
                f"{report['dropped_documents']:,} dropped (no answer fits)"
            )
        if report["kept_target_percent"] < 95 and not report["split_documents"]:
            line += "; raise --max_seq_len to keep more"
        return line


def _ranges(starts, counts):
    """np.concatenate([arange(s, s + c) for s, c in zip(starts, counts)]) without the loop."""
    offsets = np.cumsum(counts) - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - offsets, counts)


def load_pretrain(
    path, tokenizer, max_seq_len, *, cache_dir=None, val_fraction=0.0, pack=True, seed=42, num_workers=None
):
    """`(train, val)` PackedDatasets from {"text"} rows; val is None when val_fraction is 0.

    Long documents are split into pieces of max_seq_len: no token is lost, and eos stands only where a
    document ends.
    `path`: .jsonl, .json, .parquet, a Hugging Face data set name, or several separated by commas.
    pack=False puts one document (or piece) per row, padded. The held-out documents are chosen by a hash of
    their text, so they stay the same whatever the order, the seed or the tokenizer. Raises DataError naming
    file and line.
    """
    caches = _open_caches(path, "pretrain", tokenizer, cache_dir, num_workers)
    return _make(caches, tokenizer, max_seq_len, val_fraction, pack, packing.split_documents)


def load_sft(
    path,
    tokenizer,
    max_seq_len,
    *,
    cache_dir=None,
    val_fraction=0.0,
    pack=True,
    seed=42,
    num_workers=None,
    add_system_ratio=0.0,
    cut_answers=False,
):
    """`(train, val)` PackedDatasets from {"conversations"} rows; only answers are targets.

    A conversation longer than max_seq_len is cut after its last answer that fits; one whose first answer does
    not fit is dropped; both are counted in `report()`. cut_answers=True keeps what fits of the answer at the
    limit instead (without its `<|im_end|>`, so it does not teach to stop there).

    The held-out conversations are chosen by a hash of what precedes the first answer, so the same question
    never stands on both sides. add_system_ratio > 0 gives that share of the conversations without system
    message a random one, as a function of (seed, row). Else as `load_pretrain`.
    """
    if not 0 <= add_system_ratio <= 1:
        raise DataError(f"add_system_ratio must be between 0 and 1, not {add_system_ratio}")
    options = {"add_system_ratio": add_system_ratio, "seed": seed} if add_system_ratio else {}
    caches = _open_caches(path, "sft", tokenizer, cache_dir, num_workers, options)
    fit = functools.partial(packing.cut_conversations, cut_answers=cut_answers)
    return _make(caches, tokenizer, max_seq_len, val_fraction, pack, fit)


def _open_caches(path, kind, tokenizer, cache_dir, num_workers, options=None):
    from dataset import token_cache

    paths = [part.strip() for part in str(path).split(",")] if not Path(path).exists() else [path]
    encoder = TextEncoder.of(tokenizer)
    return [
        token_cache.open_cache(
            one, kind, encoder, cache_dir=cache_dir, num_workers=num_workers, options=options or {}
        )
        for one in paths
        if str(one)
    ]


def _make(caches, tokenizer, max_seq_len, val_fraction, pack, fit):
    if max_seq_len < 4:
        raise DataError(f"max_seq_len must be at least 4, not {max_seq_len}")
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction must be at least 0 and below 1, not {val_fraction}")
    encoder = TextEncoder.of(tokenizer)
    held_out = packing.held_out(np.concatenate([cache.hashes for cache in caches]), val_fraction)
    sides = []
    for choose in (~held_out, held_out):
        documents, targets, starts, lengths, base, report = 0, 0, [], [], 0, {}
        first = 0
        for cache in caches:
            chosen = np.flatnonzero(choose[first : first + cache.num_documents])
            first += cache.num_documents
            piece_starts, piece_lengths, counts = fit(cache, chosen, max_seq_len)
            starts.append(piece_starts + base)
            lengths.append(piece_lengths)
            base += cache.num_tokens
            documents += len(chosen)
            doc_lengths = np.diff(cache.offsets)[chosen]
            targets += int(cache.count_targets(cache.offsets[chosen], doc_lengths).sum())
            for name, count in counts.items():
                report[name] = report.get(name, 0) + count
        starts, lengths = np.concatenate(starts), np.concatenate(lengths)
        order, row_offsets = packing.rows(lengths, max_seq_len, pack)
        report = {
            "documents": documents,
            "source_targets": targets,
            "pieces": len(starts),
            "packed": pack,
            **report,
        }
        sides.append(
            PackedDataset(
                caches,
                starts[order],
                lengths[order],
                row_offsets,
                max_seq_len,
                encoder.pad,
                encoder.token_bytes(),
                report,
            )
        )
    train, val = sides
    if not len(train):
        names = ", ".join(str(cache.source) for cache in caches)
        raise DataError(
            f"{names}: nothing left to train on at max_seq_len {max_seq_len} "
            f"({train.report()['dropped_documents']} conversations have no answer that fits): "
            "raise --max_seq_len"
        )
    return train, val if val_fraction else None
