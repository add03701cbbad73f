"""A training run: `python -m experiments.pretrain [--config=NAME] [--config.KEY=VALUE ...] [--workdir=DIR]`.

Reads from top to bottom: what a run is made of, where it starts, the loop, and what it says at the end.
Started again with the same work directory it goes on from its newest sound checkpoint, to the bit on the same
mesh.
"""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags, logging
from ml_collections.config_dict import ConfigDict

from dsv3_jax.data.baseline import NgramCounts, bigram_cross_entropy, unigram_entropy
from dsv3_jax.data.documents import BadDocument
from dsv3_jax.data.loader import Loader, Rows, train_loader, validation_rows
from dsv3_jax.data.tokenizer import Tokenizer, default_path, default_tokenizer
from dsv3_jax.interop.tokenizer import find
from dsv3_jax.mesh import Share, share_of_process
from dsv3_jax.model import size
from dsv3_jax.training import charts, manifest, recipe, runtime, step
from dsv3_jax.training.checkpoint import Checkpoints
from dsv3_jax.training.metrics import EventLog, MetricsLog, peak_flops, write_atomically
from dsv3_jax.training.progress import progress
from dsv3_jax.training.restore import CheckpointError, load_weights, locate, read_meta
from dsv3_jax.training.step import Metrics, State
from experiments import batches, sample, settings
from experiments.records import Refused
from experiments.run import Run, make_mesh, resolve
from experiments.weights import weights_of

_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run writes; runs/<config name> unless given.")

BASELINE_TOKENS = 20_000_000  # that n-grams are counted on at most
PROMPT, CONTINUATION = 32, 64  # tokens shown at the end


class Parts(NamedTuple):
    """What a run is made of, beside its state."""

    run: Run
    name: str
    workdir: Path
    tokenizer: Tokenizer
    loader: Loader
    share: Share  # of every batch that this process loads
    validation: Rows


def main(name: str, config: ConfigDict) -> None:
    """One run; what a user can mend ends it in a sentence, without a traceback."""
    logging.set_verbosity(logging.WARNING)  # backends that are not there, and every save
    runtime.start_distributed()
    with runtime.Witness():
        try:
            pretrain(name, config, Path(_WORKDIR.value or Path("runs", name)))
        except (BadDocument, CheckpointError, Refused, runtime.Diverged) as error:
            raise SystemExit(str(error)) from None


def pretrain(name: str, config: ConfigDict, workdir: Path) -> None:
    """One run, from its config to its report."""
    run = resolve(config)
    with jax.set_mesh(make_mesh(run)), runtime.Preemption() as preemption:
        try:
            parts = assemble(run, name, workdir)
        except (ValueError, OSError) as error:  # of files that the config names
            raise Refused(str(error)) from error
        facts = {"tokenizer": parts.tokenizer.digest, "parameters": size.parameters(run.model)}
        runtime.agree(settings.flatten(config) | manifest.versions() | facts)
        resolved = config.to_dict()
        if jax.process_index() == 0:
            settings.write_resolved(config, parts.workdir / "config.json")
        with Checkpoints(
            parts.workdir / "checkpoints",
            keep=run.checkpoint.keep,
            config=resolved,
            model_config=dataclasses.asdict(run.model),
        ) as checkpoints:
            try:
                state, start = begin(parts, checkpoints)
            except (ValueError, FileNotFoundError) as error:  # of another model or stream of data, or none
                raise Refused(str(error)) from error
            log = Log(parts, start)
            state = train(parts, state, start, checkpoints, preemption, log)
        if int(state.step) == run.train.steps:
            report(parts, state, log)
        log.close()
        parts.loader.close()


def assemble(run: Run, name: str, workdir: Path) -> Parts:
    """Opens the data; the tokenizer is the config's, that of the weights, or one trained on the library."""
    workdir.mkdir(parents=True, exist_ok=True)
    kept = default_path(workdir, run.model.vocab)
    if run.start_from and not run.tokenizer and not kept.exists():
        locate(run.start_from)  # for its sentence, if nothing is there
        write_atomically(kept, find(run.start_from).read_bytes())
    tokenizer = (
        Tokenizer.load(run.tokenizer) if run.tokenizer else default_tokenizer(workdir, run.model.vocab)
    )
    tokenizer.check_fits(run.model.vocab)
    length = run.train.sequence_length
    share = share_of_process(run.context.sequences)
    loader = train_loader(run.data, tokenizer, length, *share)
    validation = validation_rows(run.data, tokenizer, length, run.train.evaluation_sequences)
    return Parts(run, name, workdir, tokenizer, loader, share, validation)


def begin(parts: Parts, checkpoints: Checkpoints) -> tuple[State, int]:
    """The newest sound checkpoint's state with its place in the data, or a fresh state; and its step."""
    run, setup = parts.run, parts.run.setup
    key = jax.random.key(run.train.seed)
    fresh: Callable[[jax.Array], State] = lambda k: State.init(k, setup)  # noqa: E731
    abstract = jax.eval_shape(fresh, key)
    restored = checkpoints.restore_newest(*_split(abstract))
    if restored is not None:
        parts.loader.restore(restored.meta.data)
        return abstract.replace(**restored.weights, **restored.rest), restored.meta.step
    if run.start_from:
        meta = read_meta(run.start_from)
        # A longer context is a change that weights are carried over for; any other is a mistake.
        stretched = {key: meta.model_config.get(key) for key in ("max_length", "yarn")}
        manifest.check_same_model(meta.model_config, dataclasses.asdict(run.model) | stretched)
        weights = load_weights(run.start_from, weights_of(run.model, meta))
        if jax.process_index() == 0:
            print(f"Starts from the weights of step {meta.step} in {run.start_from}.", flush=True)
        return jax.jit(lambda w: State.around(**_master(w), setup=setup))(weights), 0
    return jax.jit(fresh)(key), 0


def train(
    parts: Parts,
    state: State,
    start: int,
    checkpoints: Checkpoints,
    preemption: runtime.Preemption,
    log: "Log",
) -> State:
    """The loop; ends early, with the state saved, when asked to stop.

    Raises:
        Diverged: if too many steps in a row had no finite loss and gradient; the last checkpoint is good.
    """
    run, t = parts.run, parts.run.train
    previous = None
    with (
        progress(t.steps, start) as display,
        runtime.Watchdog(t.hang_seconds, first=t.slow_seconds) as watchdog,
    ):
        for number in range(start + 1, t.steps + 1):
            rows = next_rows(parts, int(state.sequences) if run.recipe.batch_ramp_tokens else 0)
            batch = batches.training_batch(rows, run.pipeline.microbatches, run.context)
            state, metrics = step.step(state, batch, setup=run.setup)
            log.count(rows)
            # The step before, so that asking does not hold up the one just begun.
            if previous is not None:
                runtime.refuse_divergence(number - 1, int(previous.skipped_in_a_row), t.max_skipped)
            previous = metrics
            last = number == t.steps
            if number % t.log_every == 0 or last:
                runtime.refuse_divergence(number, int(metrics.skipped_in_a_row), t.max_skipped)
                display.update(number, log.training(number, metrics))
                checkpoints.check_errors()
            if last or (t.evaluate_every and number % t.evaluate_every == 0):
                watchdog.expect_slow()
                display.say(log.validation(number, validate(parts, state)))
            stop = preemption.requested(number)
            if stop or last or number % run.checkpoint.every == 0:
                watchdog.expect_slow()
                checkpoints.save(number, *_split(state), parts.loader.state())
                log.draw()
            if stop:
                display.say(f"Stopped as asked after step {number}; the same command goes on from there.")
                break
            watchdog.step()
        checkpoints.wait()
    return state


def next_rows(parts: Parts, sequences: int) -> Rows:
    """This process's part of the next batch, whose size the recipe may ramp up."""
    run = parts.run
    tokens = sequences * run.train.sequence_length
    rows = recipe.batch_size(run.recipe, run.train.batch_size, run.batch_multiple, tokens)
    return parts.loader.next(rows // parts.share.parts)


def validate(parts: Parts, state: State) -> float:
    """Nats per token of the validation rows, by the main model."""
    run = parts.run
    most = run.train.batch_size // run.pipeline.microbatches
    batch = batches.validation_batch(parts.validation, most, run.context)
    total, count = step.evaluate(state.model, state.bias, batch, setup=run.setup)
    return float(total) / max(int(count), 1)


class Log:
    """Everything a run writes about itself; only the first process does."""

    def __init__(self, parts: Parts, start: int):
        """Goes on from a step, forgetting what an interrupted run wrote after it."""
        self._parts, self._mine = parts, jax.process_index() == 0
        self._metrics = MetricsLog(parts.workdir / "metrics.jsonl")
        if self._mine:
            self._metrics.resume(start)
        events = self._mine and parts.run.tensorboard
        self._events = EventLog(parts.workdir / "events", start) if events else None
        self._load: np.ndarray | None = None
        self._since, self._tokens = time.monotonic(), 0
        self._flops = size.flops_per_token(parts.run.model, parts.run.train.sequence_length)
        self._peak = peak_flops(jax.devices()[0].device_kind)

    def count(self, rows: Rows) -> None:
        """Adds a batch to the speed."""
        self._tokens += rows.tokens.shape[0] * (rows.tokens.shape[1] - 1) * self._parts.share.parts

    def training(self, number: int, metrics: Metrics) -> dict[str, Any]:
        """Writes a line for a step and returns it; waits until the step is done."""
        values = {k: np.asarray(v).item() for k, v in metrics._asdict().items() if k != "load"}
        self._load = np.asarray(metrics.load)
        now = time.monotonic()
        speed = self._tokens / (now - self._since)
        self._since, self._tokens = now, 0
        values["tokens"] = values.pop("sequences") * self._parts.run.train.sequence_length
        values["tokens_per_second"] = speed
        if self._peak is not None:
            values["mfu"] = speed * self._flops / (self._peak * jax.device_count())
        skipped = self._parts.loader.skipped
        self._write(number, values | ({"skipped_documents": sum(skipped.values())} if skipped else {}))
        return values

    def validation(self, number: int, loss: float) -> str:
        """Writes a validation line and returns a sentence."""
        self._write(number, {"val_loss": loss})
        self._since, self._tokens = time.monotonic(), 0  # validation is not training time
        return f"step {number}: validation loss {loss:.4f} nats per token"

    def draw(self, **references: float) -> None:
        """Draws the curves so far."""
        if self._mine:
            path = self._parts.workdir / "loss.png"
            charts.draw(path, self._metrics.read(), self._load, self._parts.name, references)

    def close(self) -> None:
        """Writes out what is still in memory."""
        if self._events:
            self._events.close()

    def _write(self, number: int, values: dict[str, Any]) -> None:
        if self._mine:
            self._metrics.write(number, values)
        if self._events:
            self._events.write(number, values)


def report(parts: Parts, state: State, log: "Log") -> None:
    """Prints the validation loss beside what counting words gives, and a continuation."""
    loss = validate(parts, state)
    prompt = parts.validation.tokens[0, :PROMPT]
    devices = parts.run.mesh.data * parts.run.mesh.expert
    sampled = sample.continuation(state, prompt, CONTINUATION, parts.run.setup, devices)
    if jax.process_index() != 0:
        return
    counts = counted(parts, int(state.sequences))
    unigram = unigram_entropy(counts, parts.validation)
    bigram = bigram_cross_entropy(counts, parts.validation)
    log.draw(unigram=unigram, bigram=bigram)
    print(
        f"\nvalidation loss       {loss:7.4f} nats per token"
        f"\nbigram of same tokens {bigram:7.4f}"
        f"\nunigram entropy       {unigram:7.4f}"
        f"\n\n{parts.tokenizer.decode(prompt)}\n---- continued by the model ----"
        f"\n{parts.tokenizer.decode(sampled)}"
        f"\n\nCurves, metrics and checkpoints are in {parts.workdir}."
    )


def counted(parts: Parts, sequences: int) -> NgramCounts:
    """Counts of the tokens that the run has seen, read again from the start, up to BASELINE_TOKENS."""
    run, length = parts.run, parts.run.train.sequence_length
    counts = NgramCounts(run.model.vocab)
    loader = train_loader(run.data, parts.tokenizer, length)
    for _ in range(min(sequences, BASELINE_TOKENS // length) // run.data.shards):
        counts.add(loader.next(run.data.shards))
    loader.close()
    return counts


def _master(weights: dict[str, Any]) -> dict[str, Any]:
    """Converted weights may be BF16; those that are trained are FP32."""
    return jax.tree.map(lambda w: w.astype(np.float32), weights)


def _split(state: State) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a checkpoint's users need, and what only going on needs."""
    fields = {f.name: getattr(state, f.name) for f in dataclasses.fields(state)}
    return {k: fields.pop(k) for k in ("model", "bias")}, fields


if __name__ == "__main__":
    settings.run(main)
