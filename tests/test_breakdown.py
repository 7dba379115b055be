from __future__ import annotations

import dataclasses
import io
import itertools
import json
import pathlib
import re
from typing import Any

import msgspec
import pytest

from llm_serving.diagnostics.breakdown.breakdown import Breakdown, break_down
from llm_serving.diagnostics.breakdown.load import decode_ms
from llm_serving.diagnostics.breakdown.observation import (
    BareFigures,
    ClientRequest,
    Load,
    Observation,
    load,
    save,
)
from llm_serving.diagnostics.breakdown.plot import plot_breakdown
from llm_serving.diagnostics.breakdown.report import print_breakdown
from llm_serving.diagnostics.breakdown.timeline import timeline_events, write_timeline
from llm_serving.diagnostics.breakdown.tree import Node
from llm_serving.errors import ConfigError, ServingError
from llm_serving.step_trace import StepRecord
from tests.breakdown_samples import (
    DECODE,
    MIXED,
    MS,
    PREFILL,
    Costs,
    answer_of,
    client_load,
    info,
    observation,
    simulate,
)

# One prompt, 19 tokens, twice.
TWO_ROUNDS = [PREFILL, *[DECODE] * 19] * 2
BARE = BareFigures(1, 129, 147, 38, 42.0, 39.5, 1.9, 2)
STEPS_RAN = 'llm_serving:step_period_seconds_count{kind="decode"}'


def own_load(depth: int = 1, costs: Costs | None = None, **fields: Any) -> Observation:
    """40 steps of one stream, whose clients see each token half a millisecond late."""
    records = simulate(40, depth=depth, kinds=TWO_ROUNDS, costs=costs)
    fields.setdefault("bare", BARE)
    return observation(records, load=client_load(records), **fields)


def text_of(found: Breakdown) -> str:
    stream = io.StringIO()
    print_breakdown(found, stream)
    return stream.getvalue()


def named(tree: Node, name: str) -> Node:
    return next(node for _, node in tree.walk() if node.name.startswith(name))


def adds_up(node: Node) -> bool:
    parts = [child for child in node.children if child.in_sum]
    own = not parts or sum(p.ms for p in parts) == pytest.approx(node.ms, abs=1e-9)
    return own and all(adds_up(child) for child in node.children)


def test_the_tree_of_one_stream_is_what_was_put_in() -> None:
    found = break_down(own_load())
    # A period: 40 + 2 of the model, 0.15 prepared, 0.06 written, 0.02 sent, 0.835 waited.
    assert found.tree.ms == pytest.approx(43.065)
    assert named(found.tree, "model").ms == pytest.approx(42)
    assert named(found.tree, "service").ms == pytest.approx(1.065)
    assert named(found.tree, "exposed").ms == pytest.approx(0.835)
    assert named(found.tree, "on the way").ms == pytest.approx(0.01)
    assert named(found.tree, "agent: result write").ms == pytest.approx(0.08)
    assert named(found.tree, "client's beyond").ms == pytest.approx(0, abs=1e-9)
    # The answer's first 20 us, and all of the last answer, which no step waits for.
    assert named(found.tree, "hidden").ms == pytest.approx(0.02 + 0.445 / 38)
    assert (found.basis.rows, len(found.basis.steps)) == (1, 38)


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_the_parts_of_every_node_add_up_to_it(depth: int, seed: int) -> None:
    records = simulate(40, depth=depth, kinds=TWO_ROUNDS, seed=seed, pauses=[20])
    for seen in (observation(records), observation(records, load=client_load(records))):
        found = break_down(seen)
        assert adds_up(found.tree)
        assert found.broken == []


def test_what_two_stages_cover_at_once_is_taken_out_again() -> None:
    one, two = simulate(2, depth=1)
    # The answer is on its way until after the next step has been made: a late wake-up.
    late = dict.fromkeys(("shm_read", "update", "publish", "end"), two.sent + 10000)
    found = break_down(observation([one._replace(**late), two]))
    assert named(found.tree, "two of these at once").ms == pytest.approx(-0.19)
    assert adds_up(found.tree)


def test_tokens_of_steps_that_never_had_all_streams_are_not_compared() -> None:
    records = simulate(40, depth=1, kinds=TWO_ROUNDS)  # one row a step, as with --max-num-seqs 1
    found = break_down(observation(records, load=client_load(records, streams=2), bare=BARE))
    assert found.tree.name == "decode step"
    assert found.bare == "no decode step had 2 rows, as the bare loop has"


def test_without_a_load_the_tree_is_of_the_steps_themselves() -> None:
    found = break_down(observation(simulate(40, kinds=TWO_ROUNDS, rows=3)))
    assert found.tree.name == "decode step"
    assert found.basis.rows is None
    assert [node.name for node in found.tree.children[0].children][-1] == "agent: result write"


def test_without_a_decode_step_the_tree_is_of_the_commonest_kind() -> None:
    found = break_down(observation(simulate(5, kinds=[MIXED, PREFILL, PREFILL])))
    assert (found.basis.kind, found.tree.name) == ("prefill", "prefill step")
    assert found.bare == "there is no decode step to compare with the bare model loop"
    assert "milliseconds per step: means of 3 prefill steps" in text_of(found)


def test_each_kind_of_step_has_its_own_figures() -> None:
    kinds = break_down(own_load()).kinds
    assert [(kind.name, kind.count) for kind in kinds] == [("prefill", 2), ("decode", 38)]
    prefill, decode = kinds
    assert (prefill.tokens, decode.tokens) == (128, 1)
    assert prefill.mean("forward") == pytest.approx(160)
    assert decode.period.p50 == pytest.approx(43.065)
    exposed = {stage.name: stage.exposed_ms for stage in decode.stages}
    assert exposed["publish"] == pytest.approx(0.3 * 37 / 38)  # nobody waits for the last
    assert exposed["forward"] is None


def test_p50_and_p99_are_of_the_steps() -> None:
    records = simulate(101, depth=1)
    slow = 10 * MS  # each step one hundredth slower than the one before
    torn = [
        r._replace(sample=r.forward + i * slow // 100, result_write=r.sample)
        for i, r in enumerate(records)
    ]
    forward = next(s for s in break_down(observation(torn)).kinds[0].stages if s.name == "forward")
    assert forward.spread.p50 == pytest.approx(5.0)
    assert forward.spread.p99 == pytest.approx(9.9)


def test_only_the_observed_time_counts_but_older_steps_explain_it() -> None:
    records = simulate(20, depth=1)
    seen = msgspec.structs.replace(observation(records), since_ns=records[9].done)
    found = break_down(seen)
    assert found.steps.column("step_id").tolist() == list(range(11, 21))
    assert named(found.tree, "publish").ms == pytest.approx(0.3)  # also that of step 10
    assert named(found.tree, "on the way").ms == pytest.approx(0.01)


def test_a_ring_that_was_overrun_says_how_many_steps_it_saw() -> None:
    found = break_down(observation(simulate(10), series={STEPS_RAN: 5000}))
    assert found.num_ran == 5000
    assert "5000 steps ran, and the trace still had the last 10" in found.notes[0]
    assert "checked on 10 of 5000 steps" in text_of(found)


def test_steps_that_left_no_record_are_counted() -> None:
    records = simulate(4) + simulate(3, first_id=8, start=9_000 * MS)  # 5, 6, 7 with their agent
    notes = break_down(observation(records)).notes
    assert "3 steps left no record: they failed, or were lost with their agent" in notes
    assert any(note.startswith("pauses without work, 1 of them") for note in notes)


def test_a_load_on_a_server_that_writes_logits_is_noted() -> None:
    load = Load(1, 8, 2, [ClientRequest(0, 0, [1, 2], 3, prompt_tokens=8)])
    for precision, num_notes in (None, 0), ({"num_written": 4}, 1):
        seen = observation(simulate(5), load=load, info={"precision": precision})
        assert sum("writes logits" in note for note in break_down(seen).notes) == num_notes


def test_what_does_not_hold_is_printed_in_the_place_of_the_checks() -> None:
    records = simulate(6)
    records[3] = records[3]._replace(forward=records[3].received - 5)
    records[5] = records[5]._replace(previous=records[4].done - 3)
    text = text_of(break_down(observation(records)))
    assert "what must hold and does not" in text
    assert "the stamps of 1 steps are not in order (step 4): left out" in text
    assert "step 6 began before the one ahead of it had ended" in text
    assert "checked on" not in text


def test_a_server_that_was_started_again_is_said() -> None:
    seen = msgspec.structs.replace(
        observation(simulate(5)), before="a_total 5\n", after="a_total 1\n"
    )
    assert break_down(seen).notes[0].startswith("the server was started again meanwhile")


def test_nothing_to_break_down_is_a_sentence() -> None:
    watched = observation([])
    with pytest.raises(
        ServingError, match=r"no step ran in the 10 s it was watched: send requests"
    ):
        break_down(watched)
    with pytest.raises(ServingError, match="the trace has no steps"):
        break_down(Observation(answer_of([])))


def test_overhead_is_against_the_bare_loop_of_the_same_rows_and_contexts() -> None:
    bare = break_down(own_load()).bare
    assert not isinstance(bare, str)
    assert bare.bare_ms == 42.0
    assert bare.served_ms == pytest.approx(43.065)
    assert bare.overhead_ms == pytest.approx(1.065)
    assert bare.overhead == pytest.approx(1.065 / 42)
    assert "1 row, contexts of 129 to 147 tokens, 2 threads, as in service" in bare.how


@pytest.mark.parametrize("changed", [{"rows": 2}, {"first_context": 130}, {"last_context": 200}])
def test_other_rows_or_contexts_are_not_compared(changed: dict[str, int]) -> None:
    seen = own_load(bare=msgspec.structs.replace(BARE, **changed))
    found = break_down(seen)
    assert isinstance(found.bare, str)
    assert found.bare.endswith("they cannot be compared")
    assert "bare model loop: not compared: the bare loop ran" in text_of(found)


def test_without_a_loop_the_servers_own_figure_serves_and_says_its_context() -> None:
    bare = break_down(own_load(bare=None, bare_note="the server runs on another machine")).bare
    assert not isinstance(bare, str)
    assert bare.bare_ms == 42.0
    assert bare.how == (
        "the server runs on another machine; the server's own figure, timed at its start: 1 row at "
        "a context of 192 tokens; in service they are 129 to 147"
    )


def test_watched_steps_are_compared_where_there_is_a_figure_for_their_rows() -> None:
    records = simulate(30, depth=1)
    mixed = [r._replace(num_rows=8 if i % 3 else 5) for i, r in enumerate(records)]
    bare = break_down(observation(mixed)).bare
    assert not isinstance(bare, str)
    assert bare.bare_ms == 60.0  # of 8 rows
    assert bare.how.endswith(
        "8 rows at a context of 192 tokens; in service the contexts are not known"
    )


def test_rows_that_have_no_figure_are_not_compared() -> None:
    found = break_down(observation(simulate(5, rows=3)))
    assert found.bare == "the server's own figures are for 1, 8 rows, and no step had as many"
    for said in ({}, None, {"context": 192, "rows": {"one": 3}}, {"context": 192, "rows": {}}):
        without = break_down(observation(simulate(5), info=info(bare_decode_ms=said)))
        assert without.bare == "the server has no figure of its own (/info, bare_decode_ms)"


def test_request_stages_are_checked_against_the_clients_wall() -> None:
    records = simulate(40, kinds=TWO_ROUNDS)
    asked = client_load(records)
    late = [
        msgspec.structs.replace(r, end_ns=r.end_ns + (r.end_ns - r.sent_ns) // 19)
        for r in asked.requests
    ]
    found = break_down(observation(records, load=msgspec.structs.replace(asked, requests=late)))
    assert found.requests is not None
    assert found.requests.deviation == pytest.approx(-0.05, abs=1e-4)
    assert "differ from the client's wall by -5.00 %: more than the 2 % that may" in text_of(found)
    exact = break_down(observation(records, load=asked))
    assert exact.requests is not None
    assert exact.requests.deviation == pytest.approx(0, abs=1e-9)
    assert exact.requests.share("decode") == pytest.approx(0.9, abs=0.001)


def test_decode_is_measured_while_all_streams_get_tokens() -> None:
    # The second stream's first token comes at 30 ms and the first one's last at 70.
    one = ClientRequest(0, 0, [at * MS for at in (10, 20, 30, 50, 70)], 71 * MS)
    two = ClientRequest(0, 0, [at * MS for at in (30, 50, 70, 75)], 76 * MS)
    assert decode_ms(Load(2, 128, 4, [one, two])) == pytest.approx(20)
    failed = msgspec.structs.replace(two, token_ns=[], error="500")
    assert decode_ms(Load(2, 128, 4, [one, failed])) is None


def test_what_a_load_met_with_is_noted() -> None:
    records = simulate(40, kinds=TWO_ROUNDS)
    first, second = client_load(records).requests
    requests = [
        msgspec.structs.replace(first, prompt_tokens=120),
        msgspec.structs.replace(second, error="/generate was answered with 429: full", token_ns=[]),
    ]
    series = {"vllm:prefix_cache_hits_total": 64.0}
    seen = observation(records, load=Load(1, 128, 20, requests), series=series)
    assert break_down(seen).notes == [
        "1 of 2 requests failed: /generate was answered with 429: full",
        "64 prompt tokens came from the prefix cache and were not computed",
        "prompts had 120 tokens, not 128",
    ]


def test_other_traffic_beside_the_load_is_noted() -> None:
    seen = own_load(series={"vllm:generation_tokens_total": 52.0})
    assert break_down(seen).notes == [
        "others used the server, too: 12 of 52 generated tokens were not for this load"
    ]


def test_a_saved_observation_gives_the_same_report(tmp_path: pathlib.Path) -> None:
    seen = own_load(
        depth=2, series={STEPS_RAN: 40, 'llm_serving:transport_calls_total{method="Execute"}': 40}
    )
    save(seen, tmp_path / "trace.json")
    again = load(tmp_path / "trace.json")
    assert again == seen
    assert text_of(break_down(again)) == text_of(break_down(seen))


def test_a_bare_answer_of_trace_is_a_saved_trace_of_steps(tmp_path: pathlib.Path) -> None:
    records = simulate(40, depth=1, kinds=TWO_ROUNDS)
    path = tmp_path / "trace.json"
    answer = {"now_ns": 1, "columns": StepRecord._fields, "steps": records}
    path.write_bytes(msgspec.json.encode(answer))
    found = break_down(load(path))
    assert found.tree.ms == pytest.approx(43.065)
    assert "own load" not in text_of(found)


@pytest.mark.parametrize(
    "content", [b"", b"[1]", b"{}", b'{"steps": 3}', b"\xff\xfe", b"id,ms\n1,2\n"]
)
def test_a_foreign_file_is_refused_by_its_name(tmp_path: pathlib.Path, content: bytes) -> None:
    path = tmp_path / "foreign.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"foreign\.json is neither a file of `breakdown --save`"):
        load(path)


def test_a_file_that_is_not_there_or_of_another_format_is_told(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the trace"):
        load(tmp_path / "none.json")
    save(msgspec.structs.replace(own_load(), format="llm-serving breakdown 9"), tmp_path / "t.json")
    with pytest.raises(ConfigError, match="of format 'llm-serving breakdown 9'"):
        load(tmp_path / "t.json")
    with pytest.raises(ConfigError, match="cannot save the trace"):
        save(own_load(), tmp_path / "no" / "t.json")


def test_the_report_is_readable_in_a_pipe() -> None:
    text = text_of(break_down(own_load()))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(line == line.rstrip() for line in text.splitlines())
    assert re.search(r"^client +43\.065 +100\.0 %", text, re.M)
    assert re.search(r"^├── service \(all that is not the model\) +1\.065 +2\.5 %", text, re.M)
    assert re.search(r"^│   │   ├── publish +0\.\d{3} +0\.\d %", text, re.M)
    assert re.search(
        r"^└── hidden beside the model \(not in the sum\) +0\.032 +\(0\.1 %\)", text, re.M
    )
    assert "bare model loop 42.00 ms, served 43.06 ms -> overhead 1.06 ms (+2.5 %)" in text
    assert re.search(r"^ = period +43\.065", text, re.M)


def test_a_terminal_without_unicode_gets_a_tree_too() -> None:
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding="ascii")
    print_breakdown(break_down(own_load()), stream)
    text = written.getvalue().decode("ascii")
    assert re.search(r"^\+-- service \(all that is not the model\) +1\.065 +2\.5 %$", text, re.M)
    assert re.search(r"^\|   \|   \+-- publish +0\.\d{3} +0\.\d %$", text, re.M)


def test_the_picture_is_drawn_for_one_step_and_for_many(tmp_path: pathlib.Path) -> None:
    few, many = observation(simulate(1)), own_load()
    for seen in (few, many):
        plot_breakdown(break_down(seen), tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot write the picture"):
        plot_breakdown(break_down(few), tmp_path / "no" / "a.png")


def test_the_timeline_holds_every_stage_once_and_in_its_lane(tmp_path: pathlib.Path) -> None:
    found = break_down(observation(simulate(6, seed=4)))
    write_timeline(found.steps, tmp_path / "timeline.json")
    events = json.loads((tmp_path / "timeline.json").read_text())["traceEvents"]
    assert events == list(timeline_events(found.steps))
    spans = [event for event in events if event["ph"] == "X"]
    for stage, total in (
        ("forward", found.steps.agent[:, 2]),
        ("publish", found.steps.master[:, 7]),
    ):
        lengths = [event["dur"] for event in spans if event["name"] == stage]
        assert lengths == [ns / 1e3 for ns in total.tolist()]
    for lane in (1, 2):  # what overlaps in a lane is drawn wrongly
        times = sorted((e["ts"], e["ts"] + e["dur"]) for e in spans if e["tid"] == lane)
        assert all(end <= start + 1e-6 for (_, end), (start, _) in itertools.pairwise(times))
    ways = [event["ph"] for event in events if event["name"] == "frame_receive"]
    assert ways == ["b", "e"] * 6
    assert min(event["ts"] for event in events if "ts" in event) == 0


def advice_of(costs: Costs | None = None, depth: int = 1, **fields: Any) -> list[str]:
    return break_down(own_load(depth, costs, **fields)).advice


def test_where_nothing_stands_out_the_model_is_what_is_left() -> None:
    (advice,) = advice_of()
    assert advice.startswith("nothing stands out: the model is 97.5 % of a step")


def test_an_agent_that_waits_is_told_for_what() -> None:
    (advice,) = advice_of(dataclasses.replace(Costs(), schedule=9 * MS))
    assert re.match(
        r"the agent waits for 18\.\d % of a step \(9\.6\d ms\), most of it for schedule", advice
    )
    assert "num_steps_in_flight" in advice


def test_expensive_sampling_is_told() -> None:
    (advice,) = advice_of(dataclasses.replace(Costs(), sample=8 * MS, forward=34 * MS))
    assert advice.startswith("sampling is 18.6 % of a step (8.00 ms)")


def test_prompts_that_delay_decoding_are_told_with_the_limit_to_change() -> None:
    records = simulate(40, kinds=[DECODE, DECODE, MIXED, DECODE])
    (advice,) = break_down(observation(records)).advice
    assert advice.startswith(
        "prompts delay decoding: a mixed step takes 162.2 ms, a decode step 42."
    )
    assert "10 mixed steps cost" in advice
    assert "max_step_stretch (now 2.5)" in advice


def with_timing(**timing: float) -> Observation:
    records = simulate(40, depth=2, kinds=TWO_ROUNDS)
    asked = client_load(records)
    requests = [
        msgspec.structs.replace(r, timing=r.timing | timing, end_ns=r.sent_ns + 1000 * MS)
        for r in asked.requests
    ]
    return observation(records, load=msgspec.structs.replace(asked, requests=requests), bare=BARE)


def test_a_long_queue_names_the_limit_to_raise() -> None:
    (advice,) = break_down(with_timing(queue=400)).advice
    assert advice.startswith("requests wait in the queue for 40.0 % of their time (400 ms)")
    assert "max_num_seqs (now 64)" in advice


def test_slow_text_stages_are_told() -> None:
    (advice,) = break_down(with_timing(send=90, detokenize=30)).advice
    assert advice.startswith("the front end's own stages are 12.0 % of a request, most of it send")


def test_a_model_that_is_slower_in_service_points_at_the_cores() -> None:
    slower = msgspec.structs.replace(BARE, step_ms=38.0, forward_ms=36.0, sample_ms=1.9)
    (advice,) = advice_of(bare=slower)
    assert advice.startswith("the model itself is slower in service: 42.00 ms against 37.90")
    assert "the agent's 2 threads" in advice
    faster = msgspec.structs.replace(BARE, step_ms=50.0, forward_ms=46.0)
    assert advice_of(bare=faster)[0].startswith(
        "the bare loop was slower (47.90 ms) than the model"
    )


def test_a_master_that_takes_the_agents_core_is_told() -> None:
    costs = dataclasses.replace(Costs(), answer_send=1_500_000, way=-1_480_000)
    (advice,) = advice_of(costs, depth=2)
    assert re.match(r"the agent needs 1\.50 ms \(3\.\d % of a step\) to send an answer", advice)


def test_a_noisy_machine_is_told_first() -> None:
    *usual, last = simulate(40, depth=2)
    later = ("sample", "result_write", "done", "shm_read", "update", "publish", "end")
    slow = last._replace(**{name: getattr(last, name) + 200 * MS for name in later})
    advice = break_down(observation([*usual, slow])).advice
    assert advice[0].startswith("the forward of decode steps varies from 40.0 ms (p50) to 162.0")


def test_the_largest_loss_stands_first() -> None:
    costs = dataclasses.replace(Costs(), schedule=5 * MS, sample=20 * MS)
    first, second = advice_of(costs, bare=None, info=info(bare_decode_ms={}))
    assert first.startswith("sampling is")
    assert second.startswith("the agent waits")


def test_preemptions_are_told() -> None:
    advice = advice_of(series={"vllm:num_preemptions_total": 3.0})
    assert advice[-1].startswith("3 preemptions: requests were put back")
