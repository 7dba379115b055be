"""What a valid body asks the server for: TGI's words in ours.

Decisions, where TGI's schema leaves them open:

    sampling   is on with do_sample, or a parameter that only makes sense with it; then
               temperature is 1 unless given.  Otherwise it is greedy, whatever else came
    min_p 0    turns nothing on, like top_p 1: it is the inert value
    numbers    are rounded to what a step record holds: see `sampling_values`
"""

from __future__ import annotations

import time
from dataclasses import replace

from llm_serving.api.sampling_values import drawn_seed, int32, positive_float32
from llm_serving.api.schema import GenerateBody, Parameters
from llm_serving.errors import InvalidRequest
from llm_serving.generation import SamplingParams
from llm_serving.server.llm_server import GenerationRequest

__all__ = ["is_sampled", "refuse_unsupported", "to_request", "to_sampling"]


def to_request(
    body: GenerateBody,
    *,
    is_streamed: bool,
    trace_id: str,
    arrived_s: float,
    received_s: float,
    max_timeout_s: float,
) -> GenerationRequest:
    """What `LLMServer.open` takes.  Raises InvalidRequest for what is not supported."""
    parameters = body.given()
    refuse_unsupported(parameters)
    if parameters.top_n_tokens and not (parameters.details or is_streamed):
        raise InvalidRequest(
            f"parameters.top_n_tokens: {parameters.top_n_tokens} came; it needs details or stream, "
            "or nothing would show them"
        )
    if (parameters.timeout or 0.0) > max_timeout_s:
        raise InvalidRequest(
            f"parameters.timeout: {parameters.timeout:g} came; allowed is up to {max_timeout_s:g}"
        )
    return GenerationRequest(
        prompt=body.inputs,
        sampling=to_sampling(parameters),
        max_new_tokens=parameters.max_new_tokens,
        stop=tuple(parameters.stop or ()),
        truncate=parameters.truncate,
        timeout_s=parameters.timeout,
        trace_id=trace_id,
        arrived_s=arrived_s,
        received_s=received_s,
        validated_s=time.monotonic(),
    )


def refuse_unsupported(parameters: Parameters) -> None:
    """Raise InvalidRequest for a parameter that is known, but does not hold its inert value."""
    if (parameters.best_of or 1) > 1:
        if not is_sampled(parameters):
            raise InvalidRequest("parameters.best_of: more than 1 needs sampling, as do_sample")
        raise InvalidRequest("parameters.best_of: more than 1 is not supported yet")
    if parameters.decoder_input_details:
        raise InvalidRequest("parameters.decoder_input_details: true is not supported yet")
    if parameters.watermark:
        raise InvalidRequest("parameters.watermark: true is not supported; leave it out")
    for name in ("grammar", "adapter_id"):
        if getattr(parameters, name) is not None:
            raise InvalidRequest(f"parameters.{name} is not supported yet; leave it out")


def is_sampled(p: Parameters) -> bool:
    implied = (
        p.temperature not in (None, 1.0),
        p.top_k is not None,
        (p.top_p or 1.0) < 1.0,
        (p.typical_p or 1.0) < 1.0,
        (p.min_p or 0.0) > 0.0,
    )
    return bool(p.do_sample) or any(implied)


def to_sampling(p: Parameters) -> SamplingParams:
    """The parameters of sampling; max_new_tokens and the EOS ids are the server's to set."""
    penalties = SamplingParams(
        repetition_penalty=positive_float32(p.repetition_penalty, 1.0),
        presence_penalty=p.presence_penalty or 0.0,
        frequency_penalty=p.frequency_penalty or 0.0,
        seed=drawn_seed() if p.seed is None else p.seed,
        ignore_eos=bool(p.ignore_eos),
        num_logprobs=p.top_n_tokens or 0,
    )
    if not is_sampled(p):
        return penalties
    return replace(
        penalties,
        temperature=positive_float32(p.temperature, 1.0),
        top_k=int32(p.top_k or 0),
        top_p=positive_float32(p.top_p, 1.0),
        min_p=p.min_p or 0.0,
        typical_p=positive_float32(p.typical_p, 1.0),
    )
