"""How many tokens have the prompts and the outputs?  Asked before the run, each text once.

A tokenizer file answers at once.  Without one the server's /tokenize is asked; its three known
forms are tried on a sample text, and the first that answers with tokens is kept:

    {"inputs"}                TGI, and this project's server
    {"model", "prompt"}       vLLM
    {"content"}               llama.cpp
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
from tokenizers import Tokenizer

from load_test.dataset import Entry
from load_test.errors import NotUsable
from load_test.plan import Size

__all__ = ["FileTokens", "ServerTokens", "TokenCounter", "count_sizes"]

_SAMPLE = "The quick brown fox"
_NUM_AT_ONCE = 8
_TIMEOUT = aiohttp.ClientTimeout(total=60)


class TokenCounter(Protocol):
    name: str

    async def count(self, text: str, *, is_prompt: bool) -> int: ...


class FileTokens:
    """A prompt has the special tokens that the tokenizer adds by itself, an output has none."""

    def __init__(self, path: Path) -> None:
        try:
            self._tokenizer: Any = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except OSError as exc:
            raise NotUsable(f"cannot read the tokenizer {path}: {exc.strerror}") from None
        except Exception as exc:  # the library raises nothing more special
            raise NotUsable(
                f"{path} is not a tokenizer.json of the tokenizers library: {str(exc)[:200]}"
            ) from None
        self._tokenizer.no_truncation()
        self.name = f"the file {path}"

    async def count(self, text: str, *, is_prompt: bool) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=is_prompt).ids)


class ServerTokens:
    def __init__(self, session: aiohttp.ClientSession, url: str, model: str) -> None:
        self._session = session
        self._url = url + "/tokenize"
        self._model = model
        self._form: Callable[[str, bool], dict[str, object]] | None = None
        self.name = f"the server's {self._url}"

    async def find_form(self) -> None:
        """Raises NotUsable if none of the forms is understood."""
        for form in (_tgi, self._vllm, _llama_cpp):
            if await self._ask(form(_SAMPLE, False)):
                self._form = form
                return
        raise NotUsable(
            f"nobody can count tokens: {self._url} does not answer with tokens; "
            "name the model's tokenizer.json with --tokenizer FILE"
        )

    async def count(self, text: str, *, is_prompt: bool) -> int:
        if not text:
            return 0
        assert self._form is not None, "find_form comes first"
        count = await self._ask(self._form(text, is_prompt))
        if count is None:
            raise NotUsable(
                f"{self._url} has failed on a text of {len(text)} characters: {text[:40]!r}...; "
                "name the model's tokenizer.json with --tokenizer FILE"
            )
        return count

    async def _ask(self, body: dict[str, object]) -> int | None:
        """The number of tokens; None for any other answer."""
        try:
            async with self._session.post(self._url, json=body, timeout=_TIMEOUT) as answer:
                made = await answer.json(content_type=None) if answer.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
            return None
        if isinstance(made, dict):
            made = made.get("tokens")
        return len(made) if isinstance(made, list) else None

    def _vllm(self, text: str, is_prompt: bool) -> dict[str, object]:
        return {"model": self._model, "prompt": text, "add_special_tokens": is_prompt}


def _tgi(text: str, is_prompt: bool) -> dict[str, object]:
    # the plain form where it is enough: TGI's own has no other field
    return {"inputs": text} if is_prompt else {"inputs": text, "add_special_tokens": False}


def _llama_cpp(text: str, is_prompt: bool) -> dict[str, object]:
    return {"content": text, "add_special": is_prompt}


async def count_sizes(
    entries: Sequence[Entry],
    counter: TokenCounter,
    *,
    with_prompts: bool,
    on_progress: Callable[[int, int], object],
) -> list[Size]:
    """The sizes of all entries, in order; `on_progress` is told how many texts of how many."""
    outputs = [(entry.output, False) for entry in entries]
    prompts = [(entry.prompt, True) for entry in entries] if with_prompts else []
    wanted = dict.fromkeys([*prompts, *outputs])
    texts = iter(wanted)
    known: dict[tuple[str, bool], int] = {}

    async def work() -> None:
        for text, is_prompt in texts:
            known[text, is_prompt] = await counter.count(text, is_prompt=is_prompt)
            on_progress(len(known), len(wanted))
            await asyncio.sleep(0)  # a file answers at once, and Ctrl-C wants its turn

    await _together([work] * _NUM_AT_ONCE)
    return [Size(known.get((e.prompt, True)), known[e.output, False]) for e in entries]


async def _together(works: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """All of them; the first that fails ends the others, and its own error comes out."""
    tasks = [asyncio.ensure_future(work()) for work in works]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
