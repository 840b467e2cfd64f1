"""From a record to tokens, and to which of them count in the loss."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import DataError
from harness.tasks.hf.readers import Record
from harness.tasks.hf.settings import SourceSettings

__all__ = ["Encoded", "Encoder", "text_of"]

Spans = list[tuple[int, int]]
"""Characters from, to."""

_COLUMNS = {"text": ("text",), "chat": ("messages", "conversations"), "pairs": ("prompt",)}
_GENERATION = re.compile(r"\{%-?\s*generation\b")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One document."""

    tokens: list[int]
    counted: NDArray[np.bool_] | None
    """`[len(tokens)]`: which of them are answers; None: all."""
    num_bytes: int
    """Of its text in UTF-8."""


@dataclass(frozen=True, slots=True)
class _Text:
    """A document before it is cut into tokens."""

    text: str
    answers: Spans | None
    """None: all of it."""
    is_rendered: bool = False
    """A chat template has put the special tokens in."""


class Encoder:
    """Encodes records of one source.

    Args:
        tokenizer: Of transformers, with offsets where answers alone count.
        source: None: plain text.
        answers_only: Whether only what the assistant says, or a pair's completion, counts in the loss.
    """

    def __init__(self, tokenizer: Any, source: SourceSettings | None, *, answers_only: bool) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._answers_only = answers_only
        self._marks_answers = bool(_GENERATION.search(str(tokenizer.chat_template or "")))

    def __call__(self, records: Sequence[Record], *, first: int) -> Iterator[Encoded]:
        """The documents of `records`, of which the first has the number `first` in its source.

        Raises:
            DataError: a record has not the columns that it needs, or the chat template refuses it.
        """
        texts = [self._text(record, first + place) for place, record in enumerate(records)]
        for is_rendered in (False, True):
            if len({text.is_rendered for text in texts}) == 2:
                raise DataError(f"the {self._label} mixes texts and chats", remedy="make two sources of it")
            chosen = [text for text in texts if text.is_rendered is is_rendered]
            if chosen:
                yield from self._encode(chosen, add_special_tokens=not is_rendered)

    @property
    def _label(self) -> str:
        return f"source {self._source.label}" if self._source else "standard library"

    def _encode(self, texts: Sequence[_Text], *, add_special_tokens: bool) -> Iterator[Encoded]:
        with_answers = any(text.answers is not None for text in texts)
        encoded = self._tokenizer(
            [text.text for text in texts],
            add_special_tokens=add_special_tokens,
            return_attention_mask=False,
            return_offsets_mapping=with_answers,
            verbose=False,
        )
        for place, text in enumerate(texts):
            tokens = list(encoded["input_ids"][place])
            counted = None
            if text.answers is not None:
                counted = _within(np.array(encoded["offset_mapping"][place]).reshape(-1, 2), text.answers)
            if add_special_tokens and (not tokens or tokens[-1] != self._end):
                tokens.append(self._end)  # which the model has to learn to say
                counted = None if counted is None else np.append(counted, True)
            yield Encoded(tokens, counted, len(text.text.encode()))

    @property
    def _end(self) -> int:
        end: int | None = self._tokenizer.eos_token_id
        if end is None:
            raise DataError(
                "the tokenizer has no eos_token", rule="it ends a document", remedy="set it in the tokenizer"
            )
        return end

    def _text(self, record: Record, number: int) -> _Text:
        kind, column = self._kind(record, number)
        value = record[column]
        if kind == "text":
            if not isinstance(value, str):
                raise self._wrong(number, f"{column} is a {type(value).__name__}", "text is a string")
            return _Text(value, None)
        if kind == "chat" or not isinstance(value, str):
            return self._chat(record, value, number, num_given=0 if kind == "chat" else len(value))
        completion = record.get("completion")
        if not isinstance(completion, str):
            raise self._wrong(number, "there is no completion beside prompt", "both are strings, or messages")
        whole = value + completion
        return _Text(whole, [(len(value), len(whole))] if self._answers_only else None)

    def _kind(self, record: Record, number: int) -> tuple[str, str]:
        source = self._source
        wanted = "auto" if source is None else source.kind
        column = "" if source is None else source.column
        for kind, names in _COLUMNS.items():
            for name in (column,) if column else names:
                if wanted in (kind, "auto") and name in record:
                    is_chat = isinstance(record[name], list) and kind == "text"
                    return ("chat" if is_chat and wanted == "auto" else kind), name
        raise self._wrong(
            number,
            f"it has the columns {sorted(record)}",
            "a text is in the column `text`, a chat in `messages`, a pair in `prompt` and `completion`",
            "set kind and column in task_args.sources",
        )

    def _wrong(self, number: int, problem: str, rule: str, remedy: str = "") -> DataError:
        return DataError(f"record {number} of the {self._label}: {problem}", rule=rule, remedy=remedy)

    def _chat(self, record: Record, messages: Any, number: int, *, num_given: int) -> _Text:
        if num_given:
            messages = [*messages, *record.get("completion", [])]
        if not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        ):
            raise self._wrong(number, "a message has no role", "messages are a list of {role, content}")
        tools = record.get("tools")
        tools = json.loads(tools) if isinstance(tools, str) else tools

        def render(part: Sequence[Any], *, prompt: bool = False) -> str:
            rendered: str = self._tokenizer.apply_chat_template(
                list(part), tools=tools or None, tokenize=False, add_generation_prompt=prompt
            )
            return rendered

        try:
            whole = render(messages)
            answers: Spans | None = None
            if self._answers_only and self._marks_answers and not num_given:
                answers = self._marked(messages, tools, whole)
            elif self._answers_only:
                answers = self._answers(messages, render, whole, num_given)
        except DataError:
            raise
        except Exception as error:  # whatever a template raises, in Jinja or by raise_exception
            raise self._wrong(
                number,
                f"the chat template refuses it: {type(error).__name__}: {error}",
                "messages are a list of {role, content} as the model's template wants them",
                "change the data, or name another template with task_args.tokenizer.chat_template",
            ) from error
        return _Text(whole, answers, is_rendered=True)

    def _answers(self, messages: Sequence[Any], render: Any, whole: str, num_given: int) -> Spans:
        """Where in the rendered chat the assistant speaks: what the template puts there beyond the prompt for
        it, the mark of its end included."""
        spans: Spans = []
        for place, message in enumerate(messages):
            if message["role"] != "assistant" or place < num_given:
                continue
            prompt, through = render(messages[:place], prompt=True), render(messages[: place + 1])
            end: int | None = len(through)
            if not whole.startswith(through):
                stretch = whole[len(prompt) : _num_in_common(whole, render(_changed(messages, place + 1)))]
                num = _num_of_answer(stretch, through[len(prompt) :], message)
                end = None if num is None else len(prompt) + num
            if end is None or not (whole.startswith(prompt) and through.startswith(prompt)):
                raise self._not_found("it stands where the prompt for it ends")
            spans.append((len(prompt), end))
        return spans

    def _not_found(self, rule: str) -> DataError:
        return DataError(
            f"an answer of the {self._label} cannot be found in what the chat template makes of it",
            rule=rule,
            remedy="mark answers in the template by {% generation %}, or set answers_only to false",
        )

    def _marked(self, messages: Sequence[Any], tools: Any, whole: str) -> Spans:
        """Of a template that marks them itself."""
        encoded = self._tokenizer.apply_chat_template(
            list(messages),
            tools=tools or None,
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        plain = self._tokenizer(whole, add_special_tokens=False, verbose=False)
        if encoded["input_ids"] != plain["input_ids"]:
            raise self._not_found("the template gives the same text whether its marks are asked for or not")
        offsets = zip(encoded["offset_mapping"], encoded["assistant_masks"], strict=True)
        return [(start, end) for (start, end), is_answer in offsets if is_answer]


def text_of(record: Record) -> str:
    """All that is text in a record, for a tokenizer to be trained on."""
    return "\n".join(_strings(list(record.values())))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _changed(messages: Sequence[Any], place: int) -> list[Any]:
    """The chat with another content of the message at `place`: where the two begin to differ, it stands."""
    message = messages[place]
    other = "y" if str(message.get("content") or "").lstrip().startswith("x") else "x"
    return [*messages[:place], {**message, "content": other}, *messages[place + 1 :]]


def _num_of_answer(stretch: str, as_last: str, message: Record) -> int | None:
    """How many characters of the stretch are the answer, of which templates may leave out parts that they
    show at the end of a chat, as an empty place for thoughts; None: that is not certain.

    Args:
        stretch: From where the answer begins to the content of the next message.
        as_last: The answer as it stands at the end of a chat, with the mark that ends it.
    """
    said = str(message.get("content") or "").rpartition("</think>")[2].strip()
    same = _num_in_common(stretch, as_last)
    for end in range(len(stretch), same, -1):
        if as_last.endswith(stretch[same:end]) and said in stretch[:end]:
            return end
    # Where another mark ends the last answer, all of it may be its content.
    if said and not message.get("tool_calls") and stretch.count(said) == 1:
        return stretch.index(said) + len(said)
    return None


def _num_in_common(first: str, second: str) -> int:
    """How many characters both begin with."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def _within(offsets: NDArray[np.int64], spans: Spans) -> NDArray[np.bool_]:
    """Which tokens, given by their characters from and to, touch one of the spans."""
    counted = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        counted |= (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 1] > offsets[:, 0])
    return counted
