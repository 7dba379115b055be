"""What the OpenAI family answers: the objects of a completion, streamed and not, and of a model.

A stream is one chunk per generated id; where a deadline ended it there is one more, without
text.  OpenAI's words for an end are few; `ended_by`, in the choice that has one, is the exact one:

    finish_reason   stop                       length
    ended_by        eos_token, stop_sequence   length, timeout

A token is named by its own text; one without (part of a character) by "token_id:<id>".
"""

from __future__ import annotations

import time
from collections.abc import Iterable

import msgspec
from msgspec import UNSET, UnsetType

from llm_serving.api.openai_schema import CompletionBody, StreamOptions
from llm_serving.api.sse import encode_event
from llm_serving.generation import FinishReason
from llm_serving.server.output_stream import NO_ID, OutputStream, TokenEvent
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["Choice", "Completion", "CompletionWords", "Logprobs", "Model", "ModelList", "Usage"]

DONE = b"data: [DONE]\n\n"
_FINISHED_AS = {
    FinishReason.EOS: "stop",
    FinishReason.STOP_STRING: "stop",
    FinishReason.LENGTH: "length",
    FinishReason.TIMEOUT: "length",
}
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Logprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]  # characters of the text in front of each token


class Choice(msgspec.Struct):
    index: int
    text: str
    logprobs: Logprobs | None
    finish_reason: str | None
    ended_by: str | UnsetType = UNSET


class PromptTokensDetails(msgspec.Struct):
    cached_tokens: int


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Completion(msgspec.Struct):
    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | UnsetType | None = UNSET


class Model(msgspec.Struct):
    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    max_total_tokens: int  # the context that a request may use: less if the KV cache is small


class ModelList(msgspec.Struct):
    object: str
    data: list[Model]


class CompletionWords:
    """One request's output in OpenAI's words: as an `EventFormat`, and as one answer."""

    def __init__(
        self, stream: OutputStream, tokenizer: Tokenizer, body: CompletionBody, completion_id: str
    ) -> None:
        options = body.stream_options or StreamOptions.model_validate({})
        self._stream = stream
        self._tokenizer = tokenizer
        self._id = completion_id
        self._created = int(time.time())
        self._model = body.model
        self._prefix = body.prompt if body.echo else ""
        self._has_logprobs = body.logprobs is not None
        self._has_usage = bool(options.include_usage)
        self._has_running_usage = bool(options.continuous_usage_stats)
        self._num_sent = 0  # characters

    def event(self, event: TokenEvent) -> bytes:
        return encode_event(self._chunk(event))

    def end(self, last: TokenEvent, stages: dict[str, float]) -> bytes:
        pieces = [encode_event(self._chunk(last))]
        if self._has_usage:
            pieces.append(encode_event(self._completion([], self._usage())))
        return b"".join([*pieces, DONE])

    def answer(self, events: list[TokenEvent]) -> Completion:
        """The answer that is not streamed; `events` are all of the stream's."""
        text = self._prefix + self._stream.text
        return self._completion([self._choice(events, text)], self._usage())

    def _chunk(self, event: TokenEvent) -> Completion:
        text, self._prefix = self._prefix + event.text, ""
        choice = self._choice([event], text)
        self._num_sent += len(text)
        if self._has_running_usage:
            num_tokens = min(event.index, self._stream.generated_tokens)
            return self._completion([choice], self._usage(num_tokens))
        return self._completion([choice], None if self._has_usage else UNSET)

    def _completion(self, choices: list[Choice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self._id, "text_completion", self._created, self._model, choices, usage)

    def _choice(self, events: list[TokenEvent], text: str) -> Choice:
        reason = events[-1].finish_reason
        logprobs = self._logprobs(events) if self._has_logprobs else None
        if reason is None:
            return Choice(0, text, logprobs, None)
        return Choice(0, text, logprobs, _FINISHED_AS[reason], reason.value)

    def _usage(self, num_tokens: int | None = None) -> Usage:
        """Of so many tokens of the output; None: of all."""
        num_prompt = self._stream.prompt_tokens
        num_new = self._stream.generated_tokens if num_tokens is None else num_tokens
        cached = PromptTokensDetails(self._stream.request.num_cached_tokens)
        return Usage(num_prompt, num_new, num_prompt + num_new, cached)

    def _logprobs(self, events: Iterable[TokenEvent]) -> Logprobs:
        made, offset = Logprobs([], [], [], []), self._num_sent
        for event in events:
            if event.token_id == NO_ID:
                continue
            name = self._name(event.token_id)
            made.tokens.append(name)
            made.token_logprobs.append(event.logprob)
            made.top_logprobs.append(self._alternatives(event, name))
            made.text_offset.append(offset)
            offset += len(event.text)
        return made

    def _alternatives(self, event: TokenEvent, name: str) -> dict[str, float]:
        """The likeliest tokens by name, and the sampled one; no name stands for two of them."""
        logprobs: dict[str, float] = {}
        for token_id, _, logprob, _ in event.top:
            other = name if token_id == event.token_id else self._name(token_id)
            is_taken = other in logprobs or (other == name and token_id != event.token_id)
            logprobs[_numbered(token_id) if is_taken else other] = logprob
        logprobs.setdefault(name, event.logprob)
        return logprobs

    def _name(self, token_id: int) -> str:
        text = self._tokenizer.token_text(token_id) or self._tokenizer.decode([token_id], False)
        return text if text and _REPLACEMENT not in text else _numbered(token_id)


def _numbered(token_id: int) -> str:
    return f"token_id:{token_id}"
