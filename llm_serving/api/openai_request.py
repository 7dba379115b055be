"""What a valid completion body asks the server for: OpenAI's words in ours.

Decisions, where OpenAI's schema leaves them open:

    sampling     is on unless temperature is 0; then the filters change nothing, since the
                 likeliest token passes all of them
    max_tokens   16 unless given, and refused, not clamped, if the context has less room
    seed         may be negative, and counts modulo 2^64
    numbers      are rounded to what a step record holds: see `sampling_values`
"""

from __future__ import annotations

import re
import time

from llm_serving.api.openai_schema import CompletionBody
from llm_serving.api.sampling_values import drawn_seed, int32, positive_float32
from llm_serving.errors import InvalidRequest
from llm_serving.generation import SamplingParams
from llm_serving.server.llm_server import GenerationRequest

__all__ = ["DEFAULT_MAX_TOKENS", "in_openai_words", "to_request"]

DEFAULT_MAX_TOKENS = 16
_OUR_WORDS = {
    "inputs": "prompt",
    "max_new_tokens": "max_tokens",
    "truncate": "truncate_prompt_tokens",
}
_OUR_WORD = re.compile(rf"\b({'|'.join(_OUR_WORDS)})\b")


def to_request(
    body: CompletionBody, *, vocab_size: int, trace_id: str, arrived_s: float, received_s: float
) -> GenerationRequest:
    """What `LLMServer.open` takes.  Raises InvalidRequest for what does not go together."""
    max_tokens = body.max_tokens or DEFAULT_MAX_TOKENS
    _check_together(body, max_tokens, vocab_size)
    return GenerationRequest(
        prompt=body.prompt,
        sampling=_sampling(body),
        max_new_tokens=max_tokens,
        stop=tuple(body.stop or ()),
        truncate=body.truncate_prompt_tokens,
        trace_id=trace_id,
        arrived_s=arrived_s,
        received_s=received_s,
        validated_s=time.monotonic(),
    )


def in_openai_words(sentence: str) -> str:
    """What the server says of one of its own parameters, with OpenAI's name for it.

    Only for a sentence of the server itself, which repeats nothing of what a client wrote.
    """
    return _OUR_WORD.sub(lambda word: _OUR_WORDS[word[0]], sentence)


def _check_together(body: CompletionBody, max_tokens: int, vocab_size: int) -> None:
    """Raise InvalidRequest for fields that are valid each, but not together or not here."""
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest("stream_options: it came without stream; allowed is it only with it")
    if body.echo and body.logprobs is not None:
        raise InvalidRequest(
            "echo: true came with logprobs; allowed is one of them: the log-probabilities of a "
            "prompt are not supported yet"
        )
    if (body.min_tokens or 0) > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {body.min_tokens} came; allowed is up to max_tokens, here {max_tokens}"
        )
    for token_id in body.logit_bias or ():
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"logit_bias: token id {token_id} came; allowed is 0 to {vocab_size - 1}"
            )


def _sampling(body: CompletionBody) -> SamplingParams:
    """The parameters of sampling; max_new_tokens and the EOS ids are the server's to set."""
    temperature = 1.0 if body.temperature is None else body.temperature
    return SamplingParams(
        min_tokens=body.min_tokens or 0,
        temperature=positive_float32(temperature, 1.0) if temperature else 0.0,
        top_k=int32(max(body.top_k or 0, 0)),
        top_p=positive_float32(body.top_p, 1.0),
        min_p=body.min_p or 0.0,
        repetition_penalty=positive_float32(body.repetition_penalty, 1.0),
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=drawn_seed() if body.seed is None else body.seed % 2**64,
        ignore_eos=bool(body.ignore_eos),
        num_logprobs=body.logprobs or 0,
        logit_bias=tuple((body.logit_bias or {}).items()),
    )
