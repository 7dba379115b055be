from __future__ import annotations

import asyncio
import pathlib
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from llm_serving.errors import (
    AgentDied,
    AgentError,
    ChannelError,
    InvalidRequest,
    Overloaded,
    RequestAborted,
    RequestFailed,
    Unavailable,
)
from llm_serving.generation import FinishReason, SamplingParams, TokenOutput
from llm_serving.master.master_stats import MasterStats
from llm_serving.master.request import Request
from llm_serving.master.scheduler import Limits
from llm_serving.metrics import Metrics
from llm_serving.server.llm_server import GenerationRequest, LLMServer, ServerLimits
from llm_serving.server.output_stream import NO_ID, OutputStream, TokenEvent
from llm_serving.server.tokenizer import Tokenizer
from llm_serving.testing import expected_tokens
from tests.tiny_server import TinyServer, read_all, serving
from tests.tiny_tokenizer import BOS, EOS, PIECES, SPACE, tiny_tokenizer_path

EURO = ["<0xE2>", "<0x82>", "<0xAC>"]


@pytest.fixture
def house(tmp_path: pathlib.Path) -> TinyServer:
    return TinyServer(tmp_path)


class ScriptedMaster:
    """Says what a test tells it to, under the promises of the real one."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_model_len: int = 400,
        num_kv_tokens: int = 400,
        has_stopped: Callable[[], bool] | None = None,
    ) -> None:
        self.now_s = 100.0
        stats = MasterStats(0, 0, 0.0, 0, 0, 0)
        self.metrics = Metrics("tiny", lambda: stats)
        self.server = LLMServer(
            tokenizer=tokenizer,
            limits=ServerLimits(max_model_len, num_kv_tokens, block_size=4),
            eos_token_ids=(EOS,),
            cache_salt=b"",
            metrics=self.metrics,
            health=lambda: self.sick,
            has_stopped=has_stopped,
            clock=lambda: self.now_s,
        )
        self.sick: str | None = None
        self.full: Exception | None = None
        self.requests: list[Request] = []
        self.aborted: list[tuple[Request, FinishReason]] = []
        self.server.attach(self)

    def submit(self, request: Request) -> None:
        if self.full:
            raise self.full
        self.requests.append(request)

    def abort(self, request: Request, reason: FinishReason = FinishReason.ABORT) -> None:
        self.aborted.append((request, reason))
        self.server.publish([TokenOutput(request.request_id, None, reason)])

    async def open(self, prompt: str = "hi", **fields: object) -> OutputStream:
        known = {"sampling": SamplingParams(), "received_s": self.now_s}
        return await self.server.open(GenerationRequest(prompt, **{**known, **fields}))  # type: ignore[arg-type]

    def say(self, piece: str | None, reason: FinishReason | None = None, request: int = -1) -> None:
        """One output of one step."""
        token_id = None if piece is None else PIECES.index(piece)
        output = TokenOutput(self.requests[request].request_id, token_id, reason, -0.5)
        self.server.publish([output])


@pytest.fixture
def master(tmp_path: pathlib.Path) -> ScriptedMaster:
    return ScriptedMaster(Tokenizer(tiny_tokenizer_path(tmp_path)))


async def tell(
    master: ScriptedMaster,
    pieces: Sequence[str | None],
    reason: FinishReason = FinishReason.LENGTH,
    stop: tuple[str, ...] = (),
) -> tuple[OutputStream, list[TokenEvent]]:
    """A request that is answered with these pieces, the last of them with a reason."""
    stream = await master.open(stop=stop)
    for piece in pieces[:-1]:
        master.say(piece)
    master.say(pieces[-1], reason)
    return stream, await read_all(stream)


def check(stream: OutputStream, events: Sequence[TokenEvent]) -> None:
    """What every stream keeps, however it ended."""
    assert [event.index for event in events] == list(range(1, len(events) + 1))
    assert all(event.finish_reason is None for event in events[:-1])
    assert events[-1].finish_reason is stream.finish_reason is not None
    assert "".join(event.text for event in events) == stream.text
    assert not any(event.text for event in events if event.special)
    ids = [event for event in events if event.token_id != NO_ID]
    assert len(ids) == stream.generated_tokens
    assert len(events) - len(ids) == (events[-1].token_id == NO_ID)
    assert all(event.error is None for event in events[:-1])


def texts(events: Sequence[TokenEvent]) -> list[str]:
    return [event.text for event in events]


# Answers of the real master.


def truth(house: TinyServer, prompt: str, sampling: SamplingParams) -> list[int]:
    return expected_tokens(house.tokenizer.encode(prompt), sampling)


def decoded(house: TinyServer, prompt: str, ids: Sequence[int]) -> str:
    """As the contract defines it; these prompts end with a whole character."""
    before = house.tokenizer.encode(prompt)
    whole = house.tokenizer.decode([*before, *ids])
    return whole.removeprefix(house.tokenizer.decode(before))


async def test_streams_side_by_side_have_their_own_ids_and_text(house: TinyServer) -> None:
    prompts = [f"{chr(97 + i)} the cat" for i in range(12)]
    async with serving(house):
        answers = await asyncio.gather(*(house.answer(p, max_new_tokens=40) for p in prompts))
    sampling = SamplingParams(max_new_tokens=40)
    for prompt, (stream, events) in zip(prompts, answers, strict=True):
        check(stream, events)
        ids = truth(house, prompt, sampling)
        assert [event.token_id for event in events] == ids
        assert stream.text == decoded(house, prompt, ids)
        assert stream.prompt_tokens == len(house.tokenizer.encode(prompt))
        assert stream.finish_reason is FinishReason.LENGTH


async def test_an_eos_id_ends_the_text_and_is_the_last_entry(tmp_path: pathlib.Path) -> None:
    house = TinyServer(tmp_path, eos_token_ids=range(13, 20))
    sampling = SamplingParams(max_new_tokens=60, eos_token_ids=frozenset(range(13, 20)))
    async with serving(house):
        stream, events = await house.answer("the", SamplingParams(), max_new_tokens=60)
    check(stream, events)
    ids = truth(house, "the", sampling)
    assert [event.token_id for event in events] == ids
    assert stream.generated_tokens == len(ids) < 60
    assert stream.finish_reason is FinishReason.EOS
    assert events[-1].special  # though the tokenizer does not call these ids special
    assert stream.text == decoded(house, "the", ids[:-1])


@pytest.mark.parametrize("seed", range(6))
async def test_stop_strings_end_the_text_where_a_search_would(
    tmp_path: pathlib.Path, seed: int
) -> None:
    house, rnd = TinyServer(tmp_path, num_blocks=200), random.Random(seed)
    sampling = SamplingParams(max_new_tokens=50)

    async def one() -> None:
        prompt = "".join(rnd.choice("abcxyz ") for _ in range(5)) + "a"
        ids = truth(house, prompt, sampling)
        whole = decoded(house, prompt, ids)
        at = rnd.randrange(len(whole))
        stop = rnd.choice([whole[at : at + 3], whole[at : at + 1], "zzz", whole[-2:]])
        stream, events = await house.answer(prompt, max_new_tokens=50, stop=(stop, "never"))
        check(stream, events)
        assert [event.token_id for event in events] == ids[: len(events)]
        assert stream.text == whole.partition(stop)[0]
        is_found = stop in whole
        assert stream.finish_reason is (
            FinishReason.STOP_STRING if is_found else FinishReason.LENGTH
        )

    async with serving(house):
        await asyncio.gather(*(one() for _ in range(12)))


async def test_an_agent_that_dies_is_not_seen_in_the_text(tmp_path: pathlib.Path) -> None:
    house = TinyServer(tmp_path, faults={5: AgentDied("told to")})
    async with serving(house):
        answering = asyncio.create_task(house.answer("the", max_new_tokens=20))
        await house.worker.missed.wait()
        assert "told to" in str(house.server.unready_reason())
        house.worker.restart()
        stream, events = await answering
        assert house.server.unready_reason() is None
    check(stream, events)
    assert stream.text == decoded(
        house, "the", truth(house, "the", SamplingParams(max_new_tokens=20))
    )


async def test_a_request_that_fails_ends_with_an_error(tmp_path: pathlib.Path) -> None:
    faults: dict[int, Exception | str] = dict.fromkeys(range(3, 40), ChannelError("poison"))
    house = TinyServer(tmp_path, faults=faults)
    async with serving(house):
        stream, events = await house.answer("the", max_new_tokens=20)
    check(stream, events)
    assert stream.finish_reason is FinishReason.ERROR
    assert isinstance(events[-1].error, RequestFailed)


async def test_a_master_that_dies_ends_every_stream_with_its_reason(
    tmp_path: pathlib.Path,
) -> None:
    house = TinyServer(tmp_path, faults={4: "refuse"})
    async with serving(house) as running:
        answers = await asyncio.gather(*(house.answer(p, max_new_tokens=30) for p in "abc"))
        with pytest.raises(OSError, match="the channel leaks"):
            await running
        with pytest.raises(Unavailable, match="the channel leaks"):
            await house.answer("late")
        assert "the channel leaks" in str(house.server.unready_reason())
    for stream, events in answers:
        check(stream, events)
        assert "the channel leaks" in str(events[-1].error)


async def test_a_client_that_goes_away_frees_its_blocks(house: TinyServer) -> None:
    async with serving(house):
        stream = await house.server.open(house.request("the cat", max_new_tokens=150))
        first = await stream.next()
        stream.cancel()
        stream.cancel()
        assert house.pool.num_idle == house.pool.num_blocks
        assert house.server.num_open == 0
        check(stream, [*first, *await read_all(stream)])
        stream.cancel()  # too late, no effect
    assert stream.finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("seed", range(4))
async def test_disconnects_at_random_leave_nothing(tmp_path: pathlib.Path, seed: int) -> None:
    house, rnd = (
        TinyServer(tmp_path, num_blocks=40, limits=Limits(max_num_seqs=4)),
        random.Random(seed),
    )

    async def one(name: str) -> None:
        stream = await house.server.open(house.request(name, max_new_tokens=30))
        for _ in range(rnd.randrange(12)):
            if stream.finish_reason is not None:
                break
            await stream.next()
        stream.cancel()

    async with serving(house):
        await asyncio.gather(*(one(chr(97 + i % 26) * (1 + i % 3)) for i in range(30)))
        assert house.master.stats().num_running == house.master.stats().num_waiting == 0


async def test_a_deadline_counts_from_the_arrival_at_the_door(house: TinyServer) -> None:
    house.worker.alive.clear()  # everybody waits
    async with serving(house):
        now = asyncio.get_running_loop().time()
        stream, events = await house.answer("the", received_s=now - 60, timeout_s=60.01)
    check(stream, events)
    assert stream.finish_reason is FinishReason.TIMEOUT
    assert stream.generated_tokens == 0
    assert [event.token_id for event in events] == [NO_ID]
    assert events[0].error is None


# What is held back.


async def test_bytes_of_a_character_wait_for_the_whole_of_it(master: ScriptedMaster) -> None:
    stream, events = await tell(master, ["h", *EURO, "i"])
    check(stream, events)
    assert texts(events) == ["h", "", "", "", "€i"]


async def test_what_is_held_at_the_end_comes_with_the_last_id(master: ScriptedMaster) -> None:
    stream, events = await tell(master, ["h", *EURO])
    check(stream, events)
    assert texts(events) == ["h", "", "", "€"]


async def test_an_eos_takes_no_text_the_id_before_it_does(master: ScriptedMaster) -> None:
    stream, events = await tell(master, ["h", "\n", "<eos>"], FinishReason.EOS, stop=("\n\n",))
    check(stream, events)
    assert texts(events) == ["h", "\n", ""]
    assert [event.special for event in events] == [False, False, True]
    assert stream.generated_tokens == 3


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.ABORT, FinishReason.ERROR])
async def test_an_end_without_an_id_loses_no_text(
    master: ScriptedMaster, reason: FinishReason
) -> None:
    stream, events = await tell(master, ["h", "\n", "<s>", None], reason, stop=("\n\n",))
    check(stream, events)
    assert texts(events) == ["h", "\n", "", ""]
    assert events[-1].token_id == NO_ID
    assert stream.finish_reason is reason
    assert stream.text == "h\n"


async def test_an_id_whose_text_is_held_waits_for_the_next(master: ScriptedMaster) -> None:
    stream = await master.open(stop=("\n\n",))
    master.say("h")
    master.say("\n")
    assert texts(await stream.next()) == ["h"]
    master.say("i")
    assert texts(await stream.next()) == ["", "\ni"]
    master.say(None, FinishReason.ABORT)


async def test_an_end_can_complete_a_stop_string(master: ScriptedMaster) -> None:
    stop = ("\ufffd",)
    for pieces, reason in (
        (["h", "<0xE2>"], FinishReason.LENGTH),
        (["h", "<0xE2>", "<eos>"], FinishReason.EOS),
        (["h", "<0xE2>", None], FinishReason.TIMEOUT),
    ):
        stream, events = await tell(master, pieces, reason, stop)
        check(stream, events)
        assert stream.finish_reason is FinishReason.STOP_STRING
        assert stream.text == "h"


async def test_a_stop_string_in_the_last_id_is_why_it_stopped(master: ScriptedMaster) -> None:
    stream, events = await tell(master, ["b", "the"], FinishReason.LENGTH, stop=("he",))
    check(stream, events)
    assert stream.finish_reason is FinishReason.STOP_STRING
    assert texts(events) == ["b", "t"]
    assert not master.aborted  # it had ended there anyway


async def test_what_comes_after_a_stop_string_is_dropped(master: ScriptedMaster) -> None:
    stream = await master.open(stop=("he",))
    master.say("the")
    master.say("x")
    master.say(None, FinishReason.STOP_STRING)
    events = await stream.next()
    check(stream, events)
    assert texts(events) == ["t"]
    assert master.aborted == [(stream.request, FinishReason.STOP_STRING)]
    with pytest.raises(RuntimeError, match="its last event has been taken"):
        await stream.next()


async def test_special_ids_in_the_middle_have_no_text(master: ScriptedMaster) -> None:
    stream, events = await tell(master, ["h", "<s>", "<0xC3>", "<eos>", "<0xA9>", "i"])
    check(stream, events)
    assert texts(events) == ["h", "", "", "", "", "éi"]
    assert [event.special for event in events] == [False, True, False, True, False, False]


async def test_the_space_before_the_first_word_is_kept(master: ScriptedMaster) -> None:
    _, events = await tell(master, [SPACE + "a", SPACE, "b"])
    assert texts(events) == [" a", " ", "b"]


async def test_a_reader_is_woken_once_a_step(master: ScriptedMaster) -> None:
    streams = [await master.open() for _ in range(3)]
    ids = [request.request_id for request in master.requests]
    master.server.publish([TokenOutput(i, PIECES.index("h"), None, -0.5) for i in ids])
    master.server.publish([TokenOutput(i, PIECES.index("i"), None, -0.5) for i in ids])
    for stream in streams:
        assert texts(await stream.next()) == ["h", "i"]
        stream.cancel()


async def test_alternatives_have_their_own_text(master: ScriptedMaster) -> None:
    stream = await master.open()
    top = ((PIECES.index(SPACE + "a"), -0.25), (EOS, -2.0))
    token_id, request_id = PIECES.index("h"), stream.request.request_id
    master.server.publish([TokenOutput(request_id, token_id, FinishReason.LENGTH, -0.25, top)])
    [event] = await stream.next()
    assert event.logprob == -0.25
    assert event.top == ((top[0][0], " a", -0.25, False), (EOS, "", -2.0, True))


# What is refused, and what is set.


@pytest.mark.parametrize(
    ("prompt", "fields", "sentence"),
    [
        ("", {}, "inputs: the prompt is empty; it needs at least one token"),
        (
            "b" * 20,
            {},
            "inputs: the prompt has 21 tokens; the context holds 20, so 1 .. 19 "
            "(truncate keeps the last ones)",
        ),
        (
            "b" * 11,
            {"max_new_tokens": 9},
            "max_new_tokens: 9 is too many; the prompt has 12 tokens and the context holds 20, "
            "so 1 .. 8",
        ),
        (
            "b",
            {"max_new_tokens": 0},
            "max_new_tokens: 0 is too few; the prompt has 2 tokens and the context holds 20, "
            "so 1 .. 18",
        ),
        ("b", {"truncate": 0}, "truncate: 0 is too few; 1 or more tokens are kept"),
        ("b", {"stop": ("x", "")}, "stop: a stop string is empty; it needs at least one character"),
        (
            "ab\ud83d",
            {},
            "inputs: character 2 is U+D83D, half of a surrogate pair; "
            "only valid Unicode is accepted",
        ),
        (
            "b",
            {"stop": ("\udc00",)},
            "stop: character 0 is U+DC00, half of a surrogate pair; only valid Unicode is accepted",
        ),
    ],
)
@pytest.mark.parametrize("limit", ["max_model_len", "num_kv_tokens"])
async def test_what_cannot_be_served_is_refused_in_one_sentence(
    tmp_path: pathlib.Path, limit: str, prompt: str, fields: dict[str, object], sentence: str
) -> None:
    limits = {"max_model_len": 400, "num_kv_tokens": 400, limit: 20}
    master = ScriptedMaster(
        Tokenizer(tiny_tokenizer_path(tmp_path)),
        max_model_len=limits["max_model_len"],
        num_kv_tokens=limits["num_kv_tokens"],
    )
    with pytest.raises(InvalidRequest) as caught:
        await master.open(prompt, **fields)
    assert str(caught.value) == sentence
    assert master.server.num_open == 0
    assert not master.requests


@pytest.mark.parametrize(("num_prompt", "given", "num_new"), [(2, None, 300), (350, None, 50)])
async def test_new_tokens_are_300_or_the_room_left(
    master: ScriptedMaster, num_prompt: int, given: int | None, num_new: int
) -> None:
    stream = await master.open("b" * (num_prompt - 1), max_new_tokens=given)
    assert stream.request.sampling.max_new_tokens == num_new
    stream.cancel()


async def test_exactly_the_room_left_is_served(tmp_path: pathlib.Path) -> None:
    house = TinyServer(tmp_path, num_blocks=5, block_size=4, max_model_len=100)
    async with serving(house):
        stream, events = await house.answer("b" * 11, max_new_tokens=8)
    check(stream, events)
    assert stream.generated_tokens == 8


async def test_truncate_keeps_the_last_tokens(master: ScriptedMaster) -> None:
    stream = await master.open("b" * 9000 + "the", truncate=2)
    assert stream.request.token_ids.view().tolist() == [PIECES.index("b"), PIECES.index("the")]
    assert stream.prompt_tokens == 2
    stream.cancel()
    stream = await master.open("hi", truncate=200)
    assert stream.prompt_tokens == 3
    stream.cancel()


async def test_the_server_sets_eos_and_leaves_the_rest(master: ScriptedMaster) -> None:
    sampling = SamplingParams(temperature=0.5, seed=2**63 + 1, eos_token_ids=frozenset({9}))
    stream = await master.open(sampling=sampling)
    assert stream.seed == 2**63 + 1
    assert stream.request.sampling.eos_token_ids == {EOS}
    assert stream.request.sampling.temperature == 0.5
    stream.cancel()


async def test_a_trace_id_is_no_key(master: ScriptedMaster) -> None:
    streams = [await master.open(trace_id="1") for _ in range(3)]
    assert len({request.request_id for request in master.requests}) == 3
    master.say("h", FinishReason.LENGTH, request=1)
    assert [stream.text for stream in streams] == ["", "h", ""]
    master.server.abort_all()


async def test_the_deadline_is_the_shorter_of_the_clients_and_the_servers(
    master: ScriptedMaster,
) -> None:
    for asked, allowed in ((5.0, 5.0), (None, 600.0), (1e9, 600.0)):
        stream = await master.open(timeout_s=asked, received_s=master.now_s - 2.0)
        assert stream.request.deadline_s == allowed - 2.0
        stream.cancel()


async def test_a_deadline_counts_from_the_first_byte_and_the_stages_from_the_last(
    master: ScriptedMaster,
) -> None:
    now_s = master.now_s
    stream = await master.open(
        timeout_s=5.0, arrived_s=now_s - 2.0, received_s=now_s - 0.5, validated_s=now_s - 0.25
    )
    assert stream.request.deadline_s == 3.0
    assert (stream.timings()["validate"], stream.timings()["tokenize"]) == (250.0, 250.0)
    stream.cancel()


async def test_a_long_prompt_is_encoded_beside_the_loop(
    master: ScriptedMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_begun, go_on = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def encode(text: str) -> list[int]:
        loop.call_soon_threadsafe(has_begun.set)
        assert go_on.wait(20)
        return [PIECES.index("b")] * 10

    monkeypatch.setattr(master.server.tokenizer, "encode", encode)
    opening = asyncio.create_task(master.open("b" * 5000))
    await asyncio.wait_for(has_begun.wait(), 20)  # the loop runs, though encoding has not ended
    assert master.server.num_open == 1
    go_on.set()
    stream = await opening
    assert stream.prompt_tokens == 10
    assert len(stream.request.block_hashes) == 2  # named in the thread, too
    stream.cancel()


async def test_a_prompt_that_is_far_too_long_says_how_long_it_is(master: ScriptedMaster) -> None:
    with pytest.raises(InvalidRequest, match="the prompt has 100001 tokens"):
        await master.open("b" * 100_000)


# When it is full, or going.


async def test_a_full_queue_says_when_to_come_back(master: ScriptedMaster) -> None:
    streams = [await master.open() for _ in range(40)]
    master.full = Overloaded("40 requests are waiting already")
    with pytest.raises(Overloaded):
        await master.open()
    assert master.server.retry_after_s() == 1.0  # nothing has been measured yet
    for i in range(20):
        master.now_s += 2.0
        master.say("h", FinishReason.LENGTH, request=i)
    # one in two seconds, and half of the 20 that are open
    assert master.server.retry_after_s() == pytest.approx(20.0, rel=0.1)
    assert master.server.num_open == 20
    assert streams[0].finish_reason is FinishReason.LENGTH
    master.server.abort_all()


async def test_draining_refuses_new_requests_and_lets_the_others_end(
    master: ScriptedMaster,
) -> None:
    stream = await master.open()
    assert master.server.unready_reason() is None
    master.server.begin_drain()
    assert master.server.unready_reason() == "the server is shutting down"
    with pytest.raises(Unavailable, match="shutting down"):
        await master.open()
    draining = asyncio.create_task(master.server.drained())
    await asyncio.sleep(0)
    assert not draining.done()
    master.say("h", FinishReason.LENGTH)
    await asyncio.wait_for(draining, 20)
    assert stream.finish_reason is FinishReason.LENGTH


async def test_a_server_that_ends_tells_every_reader(house: TinyServer) -> None:
    async with serving(house):
        streams = [await house.server.open(house.request(p, max_new_tokens=150)) for p in "abc"]
        await streams[0].next()
        house.server.abort_all()
        await asyncio.wait_for(house.server.drained(), 20)
        for stream in streams:
            events = await read_all(stream)
            assert isinstance(events[-1].error, RequestAborted)
            assert "shutting down" in str(events[-1].error)
        with pytest.raises(Unavailable):
            await house.answer("late")


async def test_a_request_being_encoded_when_the_server_ends_is_refused(
    master: ScriptedMaster,
) -> None:
    opening = asyncio.create_task(master.open("b" * 5000, truncate=2))
    await asyncio.sleep(0)
    assert master.server.num_open == 1
    master.server.abort_all()
    with pytest.raises(Unavailable, match="shutting down"):
        await opening
    assert not master.requests


async def test_a_sick_server_is_not_ready_but_queues(master: ScriptedMaster) -> None:
    master.sick = "agent_died: it went away"
    assert master.server.unready_reason() == "agent_died: it went away"
    stream = await master.open()
    master.say(None, FinishReason.ERROR)
    [event] = await stream.next()
    assert str(event.error) == "agent_died: it went away"


# When text cannot be made.


class Panic(BaseException):
    """As the tokenizers library raises it: no Exception."""


class BrokenDetokenizer:
    """Fails at the id, or only at the end."""

    def __init__(self, fault: type[BaseException], *, at_end: bool) -> None:
        self._fault = fault
        self._at_end = at_end

    def push(self, token_id: int) -> str:
        if not self._at_end:
            raise self._fault("no text")
        return ""

    def flush(self) -> str:
        raise self._fault("no text")

    def is_holding(self) -> bool:
        return False


def break_text(
    tokenizer: Tokenizer,
    monkeypatch: pytest.MonkeyPatch,
    *,
    of: str = "",
    fault: type[BaseException] = RuntimeError,
    at_end: bool = False,
) -> None:
    """No text can be made for prompts that end with `of`."""
    make = tokenizer.new_detokenizer

    def new_detokenizer(prompt_ids: Sequence[int]) -> object:
        is_broken = tokenizer.decode(prompt_ids).endswith(of)
        return BrokenDetokenizer(fault, at_end=at_end) if is_broken else make(prompt_ids)

    monkeypatch.setattr(tokenizer, "new_detokenizer", new_detokenizer)


@pytest.mark.parametrize("fault", [RuntimeError, Panic])
async def test_a_text_that_cannot_be_made_ends_its_own_request_only(
    house: TinyServer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    fault: type[BaseException],
) -> None:
    break_text(house.tokenizer, monkeypatch, of="b", fault=fault)
    async with serving(house) as running:
        answers = await asyncio.gather(
            *(house.answer(p, max_new_tokens=20, trace_id=f"trace-{p}") for p in "abc")
        )
        assert not running.done()
        assert house.master.stats().num_running == 0
    for prompt, (stream, events) in zip("abc", answers, strict=True):
        check(stream, events)
        if prompt == "b":
            assert stream.finish_reason is FinishReason.ERROR
            assert isinstance(events[-1].error, RequestFailed)
        else:
            ids = truth(house, prompt, SamplingParams(max_new_tokens=20))
            assert [event.token_id for event in events] == ids
    assert caplog.text.count("trace-b") == 1
    assert "no text" in caplog.text


@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("fault", [RuntimeError, Panic])
async def test_every_request_ends_though_no_text_can_be_made(
    house: TinyServer, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException], at_end: bool
) -> None:
    break_text(house.tokenizer, monkeypatch, fault=fault, at_end=at_end)
    async with serving(house) as running:
        answers = await asyncio.gather(*(house.answer(p, max_new_tokens=9) for p in "abc"))
        assert not running.done()
    for stream, events in answers:
        check(stream, events)
        assert isinstance(events[-1].error, RequestFailed)
    assert 'finished_reason="error",model_name="tiny"} 3.0' in house.metrics.render().decode()


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.ABORT, FinishReason.ERROR])
async def test_an_end_from_outside_is_told_though_no_text_can_be_made(
    master: ScriptedMaster, monkeypatch: pytest.MonkeyPatch, reason: FinishReason
) -> None:
    break_text(master.server.tokenizer, monkeypatch, at_end=True)
    stream, events = await tell(master, ["h", None], reason)
    check(stream, events)
    assert stream.finish_reason is FinishReason.ERROR
    assert master.server.num_open == 0
    assert not master.aborted  # it had ended there anyway


async def test_a_shutdown_ends_every_stream_though_no_text_can_be_made(
    house: TinyServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_text(house.tokenizer, monkeypatch, at_end=True)
    house.worker.alive.clear()  # everybody waits
    async with serving(house):
        streams = [await house.server.open(house.request(p)) for p in "abc"]
        house.server.abort_all()
        await asyncio.wait_for(house.server.drained(), 20)
        for stream in streams:
            check(stream, await read_all(stream))


async def test_a_master_that_dies_ends_every_stream_though_no_text_can_be_made(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = TinyServer(tmp_path, faults={4: "refuse"})
    break_text(house.tokenizer, monkeypatch, at_end=True)
    async with serving(house) as running:
        answers = await asyncio.gather(*(house.answer(p, max_new_tokens=30) for p in "abc"))
        with pytest.raises(OSError, match="the channel leaks"):
            await running
    for stream, events in answers:
        check(stream, events)
        assert stream.finish_reason is FinishReason.ERROR


async def test_readers_are_woken_even_if_the_master_cannot_be_told(
    master: ScriptedMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = await master.open(stop=("h",)), await master.open()

    def abort(request: Request, reason: FinishReason) -> None:
        raise RuntimeError("a bug of the master's")

    monkeypatch.setattr(master, "abort", abort)
    with pytest.raises(RuntimeError, match="a bug of the master's"):
        master.say("h", request=0)
    assert (await asyncio.wait_for(first.next(), 20))[-1].finish_reason is FinishReason.STOP_STRING
    master.say("h", FinishReason.LENGTH, request=1)
    assert second.finish_reason is FinishReason.LENGTH


async def test_a_request_that_fails_on_a_sound_server_is_at_fault_itself(
    master: ScriptedMaster, caplog: pytest.LogCaptureFixture
) -> None:
    stream = await master.open(trace_id="nan")
    master.say(None, FinishReason.ERROR)
    [event] = await stream.next()
    assert isinstance(event.error, RequestFailed)
    assert "request nan failed" in caplog.text


async def test_an_agent_that_is_away_is_no_excuse_if_the_server_goes_on(
    tmp_path: pathlib.Path,
) -> None:
    stops = [False, True]
    master = ScriptedMaster(Tokenizer(tiny_tokenizer_path(tmp_path)), has_stopped=stops.pop)
    master.sick = "agent_died: of that very request"
    kinds = []
    for _ in range(2):
        stream = await master.open()
        master.say(None, FinishReason.ERROR)
        kinds.append([type(event.error) for event in await stream.next()])
    assert kinds == [[AgentError], [RequestFailed]]


# What is measured.


async def test_time_without_requests_does_not_make_the_server_look_slow(
    master: ScriptedMaster,
) -> None:
    master.now_s += 300.0
    for _ in range(110):
        await master.open()
    for i in range(10):
        master.now_s += 0.1
        master.say("h", FinishReason.LENGTH, request=i)
    assert master.server.num_open == 100
    assert master.server.retry_after_s() == pytest.approx(5.0, rel=0.01)  # 50 at 10/s
    master.server.abort_all()


@pytest.mark.parametrize("reason", [FinishReason.TIMEOUT, FinishReason.ABORT, FinishReason.ERROR])
async def test_what_was_not_served_does_not_make_the_server_look_fast(
    master: ScriptedMaster, reason: FinishReason
) -> None:
    for _ in range(40):
        await master.open()
    for i in range(20):
        master.now_s += 1.0
        master.say("h", FinishReason.LENGTH if i % 2 else None, request=i)
        master.say(None, reason, request=i)  # no effect on those that have ended
    assert master.server.num_open == 20
    assert master.server.retry_after_s() == pytest.approx(20.0, rel=0.1)  # 10 at 0.5/s
    master.server.abort_all()


async def test_the_stages_add_up_to_the_time_since_arrival(master: ScriptedMaster) -> None:
    stream = await master.open(received_s=master.now_s - 0.5)
    master.now_s += 1.0
    before = {"read": 0.0, "validate": 0.0, "tokenize": 500.0, "queue": 1000.0}
    after = {"prefill": 0.0, "decode": 0.0, "detokenize": 0.0, "send": 0.0}
    assert stream.timings() == {**before, **after}
    stream.request.started_s = master.now_s
    master.now_s += 0.25
    master.say("h")
    master.now_s += 2.0
    assert stream.timings() == {**before, **after, "prefill": 250.0, "send": 2000.0}
    master.say("i", FinishReason.LENGTH)
    master.now_s += 0.125
    master.server.answered(stream)
    master.now_s += 50.0
    stages = {**before, **after, "prefill": 250.0, "decode": 2000.0, "send": 125.0}
    assert stream.timings() == stages
    text = master.metrics.render().decode()
    for stage, ms in stages.items():
        name = f'llm_serving:request_stage_seconds_sum{{model_name="tiny",stage="{stage}"}}'
        assert f"{name} {ms / 1e3}" in text


async def test_making_the_last_text_is_a_stage_of_its_own(
    master: ScriptedMaster, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = await master.open()
    take = OutputStream.take

    def take_slowly(stream: OutputStream, *args: Any) -> float | None:
        found = take(stream, *args)
        master.now_s += 0.5
        return found

    master.say("h")
    monkeypatch.setattr(OutputStream, "take", take_slowly)
    master.say("i", FinishReason.LENGTH)
    assert stream.timings()["detokenize"] == 500.0


async def test_a_request_leaves_its_marks_in_the_metrics(master: ScriptedMaster) -> None:
    stream = await master.open()
    stream.request.started_s = master.now_s = 101.0
    for piece, reason in (("h", None), ("i", None), ("<eos>", FinishReason.EOS)):
        master.now_s += 0.5
        master.say(piece, reason)
    gone = await master.open()
    gone.cancel()
    text = master.metrics.render().decode()
    for line in (
        'vllm:prompt_tokens_total{model_name="tiny"} 3.0',
        'vllm:generation_tokens_total{model_name="tiny"} 3.0',
        'vllm:inter_token_latency_seconds_count{model_name="tiny"} 2.0',
        'vllm:inter_token_latency_seconds_sum{model_name="tiny"} 1.0',
        'vllm:time_to_first_token_seconds_sum{model_name="tiny"} 1.5',
        'vllm:request_queue_time_seconds_sum{model_name="tiny"} 1.0',
        'vllm:request_prefill_time_seconds_sum{model_name="tiny"} 0.5',
        'vllm:request_decode_time_seconds_sum{model_name="tiny"} 1.0',
        'vllm:e2e_request_latency_seconds_sum{model_name="tiny"} 2.5',
        'vllm:e2e_request_latency_seconds_count{model_name="tiny"} 1.0',
        'vllm:request_success_total{finished_reason="stop",model_name="tiny"} 1.0',
        'vllm:request_success_total{finished_reason="abort",model_name="tiny"} 1.0',
    ):
        assert line in text, line


def test_the_tiny_vocabulary_is_that_of_the_fake_agent() -> None:
    assert PIECES[BOS] == "<s>"
    assert PIECES[EOS] == "<eos>"
