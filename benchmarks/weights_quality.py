"""What does each form of the weights cost?  Perplexity, KL and top-1 agreement against float32.

    python benchmarks/weights_quality.py [MODEL] [--weights native int8] [--kv-dtype auto int8]
        [--chunks 40] [--llama-perplexity build/bin/llama-perplexity]

The text is the shipped data set, record after record, cut into chunks of 512 tokens; the positions
of a chunk's second half are scored, each with at least 256 tokens behind it.  The reference is
transformers in float32 with the weights of the same file, dequantised.  Ours are the logits that
the agent's ModelRunner gives to whoever wants them.

llama-perplexity is handed the reference's log-probabilities in a file of its own format, and so the
same tokens and positions.  It leaves out of its KL what the reference has below e**-16: the column
`KL by its rule` has ours so, too.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import tempfile
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from llama_perplexity import CUT, BaseFile, ask
from tokenizers import Tokenizer

from llm_serving.agent.model_runner import ModelRunner
from llm_serving.agent.processors import num_processors
from llm_serving.baseline.reference import Reference
from llm_serving.errors import ConfigError
from llm_serving.generation import SAMPLING_DTYPE, SamplingParams
from llm_serving.model_card import ModelCard
from llm_serving.prepare.prepare import prepare
from llm_serving.prepare.progress import Quiet
from llm_serving.step_arrays import StepInputs

Ids = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]

DATASET = pathlib.Path(__file__).parents[1] / "performance_serving" / "dataset.json"
CHUNK = 512
SCORED = slice(CHUNK // 2, CHUNK - 1)  # as llama-perplexity: nothing is known behind the last one
NUM_SCORED = SCORED.stop - SCORED.start
BLOCK_SIZE = 16
FORMS = ("float32", "bfloat16", "int8", "native")
COLUMNS = ("", "perplexity", "KL, mean", "KL by its rule", "top-1 the same")


class Truth:
    """The reference at the scored positions of a chunk: [positions, vocab], and what came next."""

    def __init__(self, reference: Reference, ids: Ids) -> None:
        places = range(SCORED.start, SCORED.stop)
        logits = np.stack([row for _, row in reference.logits_at(ids, places)])
        self.log_probs = log_softmax(logits)
        self.probs = np.exp(self.log_probs, dtype=np.float64)
        self.next_ids = ids[SCORED.start + 1 : SCORED.stop + 1]


@dataclass(slots=True)
class Score:
    """Over all positions so far, in nats."""

    nll: float = 0.0
    num_same: int = 0
    cut_kl: float = 0.0
    kl: list[float] = field(default_factory=list)  # of each position

    def add(self, truth: Truth, log_probs: Floats) -> None:
        apart = truth.probs * (truth.log_probs - log_probs)
        self.kl += apart.sum(1).tolist()
        self.cut_kl += float(apart[truth.log_probs > CUT].sum())
        of_next = np.take_along_axis(log_probs, truth.next_ids[:, None], 1)
        self.nll -= float(of_next.sum(dtype=np.float64))
        self.num_same += int((truth.log_probs.argmax(1) == log_probs.argmax(1)).sum())

    def columns(self) -> list[str]:
        n = len(self.kl)
        kl = _with_error(float(np.mean(self.kl)), float(np.std(self.kl) / np.sqrt(n - 1)))
        return [
            f"{np.exp(self.nll / n):.4f}",
            kl,
            f"{self.cut_kl / n:.2e}",
            _share(self.num_same / n),
        ]


class Ours:
    def __init__(self, card: ModelCard, kv_dtype: str, num_threads: int) -> None:
        self._runner = ModelRunner.load(
            card,
            device="cpu",
            max_model_len=CHUNK,
            block_size=BLOCK_SIZE,
            num_blocks=CHUNK // BLOCK_SIZE,
            max_num_seqs=NUM_SCORED,
            max_num_batched_tokens=CHUNK,
            num_threads=num_threads,
            phase=lambda _: None,
            kv_dtype=kv_dtype,
        )

    def log_probs(self, ids: Ids) -> Floats:
        """[positions, vocab] of a chunk."""
        return log_softmax(self._runner.execute(_step(ids), lambda: None).logits)


def _step(ids: Ids) -> StepInputs:
    """A chunk as one row, with a sample whose logits are wanted at every scored position."""
    places, none = np.arange(CHUNK, dtype=np.int32), np.empty(0, np.int32)
    return StepInputs(
        step_id=1,
        input_ids=ids,
        positions=places,
        slots=places,
        query_starts=np.array([0, CHUNK], np.int32),
        context_lens=np.array([CHUNK], np.int32),
        block_tables=np.arange(CHUNK // BLOCK_SIZE, dtype=np.int32)[None],
        sources=np.array([-1], np.int32),
        adapter_ids=np.zeros(1, np.int32),
        logit_positions=places[SCORED],
        sampling=np.frombuffer(SamplingParams().record() * NUM_SCORED, SAMPLING_DTYPE),
        history_starts=np.zeros(NUM_SCORED + 1, np.int32),
        history_ids=none,
        history_prompt_lens=np.zeros(NUM_SCORED, np.int32),
        bias_rows=none,
        bias_ids=none,
        bias_values=np.empty(0, np.float32),
        wanted_logits=np.arange(NUM_SCORED, dtype=np.int32),
    )


def log_softmax(logits: Floats) -> Floats:
    """Of each row; the sum is in float64."""
    shifted = logits - logits.max(1, keepdims=True)
    log_sums = np.log(np.exp(shifted).sum(1, keepdims=True, dtype=np.float64))
    log_probs: Floats = shifted - log_sums.astype(np.float32)
    return log_probs


def read_chunks(card: ModelCard, text: str, most: int) -> Ids:
    """[chunks, CHUNK]."""
    ids = Tokenizer.from_file(card.tokenizer).encode(text, add_special_tokens=False).ids
    num = min(most, len(ids) // CHUNK)
    if num < 1:
        raise ConfigError(f"the text has {len(ids)} tokens, one chunk takes {CHUNK}")
    return np.array(ids[: num * CHUNK], np.int32).reshape(num, CHUNK)


def dataset_text() -> str:
    records = json.loads(DATASET.read_text())
    parts = ([each["instruction"], each["input"], each["output"]] for each in records)
    return "\n\n".join("\n".join(filter(None, three)) for three in parts)


def measure(args: argparse.Namespace) -> list[list[str]]:
    cards = {"`--dtype float32`": prepare(args.model, "float32", Quiet(), "auto")}
    for form in args.weights:
        cards[f"`--weights {form}`"] = prepare(args.model, "auto", Quiet(), form)
    card = cards["`--dtype float32`"]
    chunks = read_chunks(
        card, dataset_text() if args.text is None else args.text.read_text(), args.chunks
    )
    num_positions = len(chunks) * NUM_SCORED
    print(f"{card.name}: {len(chunks)} chunks of {CHUNK} tokens, {num_positions} positions")
    reference = Reference.load(card, num_threads=args.threads, quiet=True)
    models = {
        name if kv_dtype == "auto" else f"{name} `--kv-dtype {kv_dtype}`": Ours(
            each, kv_dtype, args.threads
        )
        for name, each in cards.items()
        for kv_dtype in args.kv_dtype
    }
    exact, scores = Score(), {name: Score() for name in models}
    with tempfile.NamedTemporaryFile() as file:
        base = BaseFile(file, chunks, card.config.vocab_size)
        for number, ids in enumerate(chunks, 1):
            truth = Truth(reference, ids)
            exact.add(truth, truth.log_probs)
            base.add(truth.log_probs)
            for name, model in models.items():
                scores[name].add(truth, model.log_probs(ids))
            print(f"\r{number} of {len(chunks)}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        file.flush()
        rows = [["transformers, float32", *exact.columns()]]
        rows += [[name, *score.columns()] for name, score in scores.items()]
        if args.llama_perplexity is not None:
            found = ask(args.llama_perplexity, card.source, file.name, CHUNK, args.threads)
            kl, same = _with_error(*found.kl), _share(found.same_top1)
            rows.append(["llama.cpp, same file", f"{found.perplexity:.4f}", "", kl, same])
    return rows


def _with_error(value: float, error: float) -> str:
    return f"{value:.2e} ± {error:.0e}"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("model", nargs="?", default="smollm2-135m-instruct", help="as `serve --model`")
    add("--weights", nargs="+", choices=FORMS, default=FORMS, help="as `serve --weights`")
    add("--kv-dtype", nargs="+", choices=("auto", "int8"), default=["auto"], help="as `serve`")
    add("--text", type=pathlib.Path, help="a text file instead of the data set")
    add("--chunks", type=int, default=40, help="at most so many")
    add("--threads", type=int, help="of ours, the reference and llama-perplexity [processors]")
    add("--llama-perplexity", type=pathlib.Path, help="the program; the model is a GGUF file then")
    args = parser.parse_args()
    if args.threads is None:
        args.threads = num_processors(pathlib.Path("/proc"), pathlib.Path("/sys/fs/cgroup"))
    try:
        rows = measure(args)
    except (ConfigError, OSError) as exc:
        print(f"weights_quality: {exc}", file=sys.stderr)
        return 1
    for row in [list(COLUMNS), ["---"] * len(COLUMNS), *rows]:
        print("| " + " | ".join(row) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
