"""`/tokenize` and `/detokenize`, in the words of TGI and of vLLM, told apart by their keys.

    {"inputs": ...}              TGI     -> [{"id", "text", "start", "stop"}, ...]
    {"model"?, "prompt": ...}    vLLM    -> {"count", "max_model_len", "tokens", "token_strs"}
    {"model"?, "tokens": [...]}  vLLM    -> {"prompt": ...}; {"ids": [...]} means the same

Both read special tokens in a text, and add those that the tokenizer's own settings add, unless
`add_special_tokens` is false.  `start` and `stop` count characters of the text; `text` is that
part of it, and a special token that was added has none.  Detokenizing keeps special tokens.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from llm_serving.api.body import parse_json
from llm_serving.api.endpoint import Endpoint
from llm_serving.api.exchange import Exchange
from llm_serving.api.fields import Flag, Text, TokenIds
from llm_serving.api.names import check_name
from llm_serving.api.schema import read
from llm_serving.api.settings import ApiSettings
from llm_serving.errors import InvalidRequest
from llm_serving.server.llm_server import LLMServer

__all__ = [
    "Detokenize",
    "DetokenizeBody",
    "DetokenizeIdsBody",
    "Detokenized",
    "TextToken",
    "Tokenize",
    "TokenizeInputsBody",
    "TokenizePromptBody",
    "Tokenized",
]


class TokenizeInputsBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: Text = Field(description="a non-empty string")
    add_special_tokens: Flag | None = Field(None, description="true or false; true if not given")


class TokenizePromptBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text | None = Field(None, description="a name the model is served under")
    prompt: Text = Field(description="a non-empty string")
    add_special_tokens: Flag | None = Field(None, description="true or false; true if not given")
    return_token_strs: Flag | None = Field(None, description="true or false")


class DetokenizeBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Text | None = Field(None, description="a name the model is served under")
    tokens: TokenIds = Field(description="a list of token ids")


class DetokenizeIdsBody(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: TokenIds = Field(description="a list of token ids")


class TextToken(msgspec.Struct):
    id: int
    text: str
    start: int
    stop: int


class Tokenized(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct):
    prompt: str


class Tokenize(Endpoint):
    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._server = server
        self._settings = settings

    async def answer(self, exchange: Exchange) -> None:
        value = parse_json(await exchange.read_body())
        if isinstance(value, dict) and "inputs" in value:
            made: object = await self._tokenize_inputs(read(TokenizeInputsBody, value))
        else:
            made = await self._tokenize_prompt(read(TokenizePromptBody, value))
        await exchange.answer(200, msgspec.json.encode(made))

    async def _tokenize_inputs(self, body: TokenizeInputsBody) -> list[TextToken]:
        spans = await self._spans(body.inputs, body.add_special_tokens)
        return [TextToken(i, body.inputs[start:stop], start, stop) for i, start, stop in spans]

    async def _tokenize_prompt(self, body: TokenizePromptBody) -> Tokenized:
        check_name(body.model, self._settings.served_names)
        ids = [i for i, _, _ in await self._spans(body.prompt, body.add_special_tokens)]
        texts = (
            [self._server.tokenizer.decode([i], False) for i in ids]
            if body.return_token_strs
            else None
        )
        return Tokenized(len(ids), self._server.limits.max_model_len, ids, texts)

    async def _spans(self, text: str, add_special: bool | None) -> list[tuple[int, int, int]]:
        """In a thread: a body may hold two million characters."""
        return await asyncio.to_thread(self._server.tokenizer.spans, text, add_special is not False)


class Detokenize(Endpoint):
    def __init__(self, server: LLMServer, settings: ApiSettings) -> None:
        self._server = server
        self._settings = settings

    async def answer(self, exchange: Exchange) -> None:
        value = parse_json(await exchange.read_body())
        if isinstance(value, dict) and "ids" in value:
            ids = read(DetokenizeIdsBody, value).ids
        else:
            body = read(DetokenizeBody, value)
            check_name(body.model, self._settings.served_names)
            ids = body.tokens
        self._check_ids(ids)
        prompt = await asyncio.to_thread(self._server.tokenizer.decode, ids, False)
        await exchange.answer(200, msgspec.json.encode(Detokenized(prompt)))

    def _check_ids(self, ids: Sequence[int]) -> None:
        size = self._server.tokenizer.vocab_size
        if wrong := [i for i in ids if not 0 <= i < size][:1]:
            raise InvalidRequest(f"token id {wrong[0]} came; allowed is 0 to {size - 1}")
