"""Can this be served, and what exactly is asked of the master?

`Admission.prepare` turns words of the front desk into a Request, or says in one sentence which
field is wrong, what came and what is allowed.  It touches no shared state, so that a long prompt
is encoded and its blocks are hashed in a thread.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

from llm_serving.errors import InvalidRequest
from llm_serving.generation import SamplingParams
from llm_serving.master.request import Request
from llm_serving.server.detokenizer import Detokenizer
from llm_serving.server.tokenizer import Tokenizer

__all__ = ["Admission", "GenerationRequest", "ServerLimits", "check_text"]


@dataclass(frozen=True, slots=True)
class ServerLimits:
    max_model_len: int  # tokens of prompt and output
    num_kv_tokens: int  # what the whole KV pool holds
    block_size: int
    max_timeout_s: float = 600.0
    default_max_new_tokens: int = 300

    @property
    def context(self) -> int:
        """Tokens of prompt and output that a request alone could have."""
        return min(self.max_model_len, self.num_kv_tokens)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    prompt: str
    sampling: SamplingParams  # eos_token_ids and max_new_tokens in it are ignored
    received_s: float  # time.monotonic(), as the event loop's clock; when its last byte came
    arrived_s: float | None = None  # when its first byte came; None: received_s
    validated_s: float | None = None  # when it had become this; None: received_s
    max_new_tokens: int | None = None  # None: the default, or the room left if that is less
    stop: tuple[str, ...] = ()
    truncate: int | None = None  # keep so many of the last prompt tokens
    timeout_s: float | None = None  # since arrived_s; None: the server's limit
    trace_id: str = ""  # the name for it in the log; never a key in here


class Admission:
    def __init__(
        self,
        tokenizer: Tokenizer,
        limits: ServerLimits,
        eos_token_ids: Collection[int],
        cache_salt: bytes,
        clock: Callable[[], float],
    ) -> None:
        self._tokenizer = tokenizer
        self._limits = limits
        self._eos_token_ids = frozenset(eos_token_ids)
        self._cache_salt = cache_salt
        self._clock = clock
        self._request_ids = map(str, itertools.count(1))

    def prepare(self, asked: GenerationRequest) -> tuple[Request, Detokenizer]:
        """Encode a prompt, check it and name its blocks.  Raises InvalidRequest."""
        num_prompt, ids = self._prompt_ids(asked)
        max_new_tokens = self._max_new_tokens(asked, num_prompt)
        now_s = self._clock()
        limit_s = self._limits.max_timeout_s
        timeout_s = limit_s if asked.timeout_s is None else min(asked.timeout_s, limit_s)
        arrived_s = asked.received_s if asked.arrived_s is None else asked.arrived_s
        request = Request(
            next(self._request_ids),
            ids,
            replace(
                asked.sampling, max_new_tokens=max_new_tokens, eos_token_ids=self._eos_token_ids
            ),
            arrival=now_s,
            deadline_s=arrived_s + timeout_s - now_s,
            cache_salt=self._cache_salt,
        )
        request.hash_blocks(self._limits.block_size)
        return request, self._tokenizer.new_detokenizer(ids)

    def _prompt_ids(self, asked: GenerationRequest) -> tuple[int, list[int]]:
        """How many tokens the prompt has, and as many of the last ones as could be of use.

        A list of millions of ids must not live on in an exception: freeing it stops the loop.
        """
        ids = self._tokenizer.encode(asked.prompt)
        num_prompt = len(ids) if asked.truncate is None else min(len(ids), asked.truncate)
        return num_prompt, ids[len(ids) - min(num_prompt, self._limits.context) :]

    def _max_new_tokens(self, asked: GenerationRequest, num_prompt: int) -> int:
        context = self._limits.context
        room, wanted = context - num_prompt, asked.max_new_tokens
        if num_prompt == 0:
            raise InvalidRequest("inputs: the prompt is empty; it needs at least one token")
        if room < 1:
            raise InvalidRequest(
                f"inputs: the prompt has {num_prompt} tokens; the context holds {context}, so "
                f"1 .. {context - 1} (truncate keeps the last ones)"
            )
        if wanted is None:
            return min(self._limits.default_max_new_tokens, room)
        if not 1 <= wanted <= room:
            raise InvalidRequest(
                f"max_new_tokens: {wanted} is too {'few' if wanted < 1 else 'many'}; the prompt "
                f"has {num_prompt} tokens and the context holds {context}, so 1 .. {room}"
            )
        return wanted


def check_text(asked: GenerationRequest) -> None:
    """Raise InvalidRequest for what no tokenizer or stop string could take."""
    _check_unicode("inputs", asked.prompt)
    for stop in asked.stop:
        if not stop:
            raise InvalidRequest("stop: a stop string is empty; it needs at least one character")
        _check_unicode("stop", stop)
    if asked.truncate is not None and asked.truncate < 1:
        raise InvalidRequest(f"truncate: {asked.truncate} is too few; 1 or more tokens are kept")


def _check_unicode(field: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as exc:
        half = f"U+{ord(text[exc.start]):04X}"
        raise InvalidRequest(
            f"{field}: character {exc.start} is {half}, half of a surrogate pair; "
            "only valid Unicode is accepted"
        ) from None
