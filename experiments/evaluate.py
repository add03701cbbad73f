"""Tasks of lm-evaluation-harness: `python -m experiments.evaluate --checkpoint=DIR --tasks=stdlib`.

`stdlib` is all tasks that are here, made of the standard library's text that `tiny` is not trained on:
`stdlib_next_line`, `stdlib_fill_in_middle`, `stdlib_fill_in_middle_choice`, `stdlib_code` and `stdlib_prose`.
Any other task works where its data is at hand. Needs the extra `[eval]`. On several hosts start the
same command on each.
"""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError
from dsv3_jax.training.runtime import Witness, start_distributed
from experiments import model_flags

_TASKS = flags.DEFINE_list("tasks", ["stdlib"], "Tasks, groups and tags.")
_INCLUDE_PATH = flags.DEFINE_multi_string("include_path", [], "A folder of your own tasks, in YAML.")
_OUTPUT = flags.DEFINE_string("output", None, "The JSON to write; else results are printed alone.")
_LIMIT = flags.DEFINE_integer("limit", None, "Questions of each task; else all.", lower_bound=1)
_NUM_FEWSHOT = flags.DEFINE_integer("num_fewshot", None, "Questions shown before each.", lower_bound=0)
_CHAT = flags.DEFINE_bool("apply_chat_template", False, "Put questions into the checkpoint's template.")
_MULTITURN = flags.DEFINE_bool("fewshot_as_multiturn", True, "In it, show questions as turns of their own.")
_SYSTEM = flags.DEFINE_string("system_instruction", None, "What stands before everything.")
_GEN_KWARGS = flags.DEFINE_string("gen_kwargs", None, "temperature=0.7,do_sample=true; before a task's.")
_SAMPLES = flags.DEFINE_bool("log_samples", False, "Write every question and its answers too.")
_BOOTSTRAP = flags.DEFINE_integer("bootstrap_iters", 100_000, "For standard errors; 0 for none.", 0)
_MAX_LENGTH = flags.DEFINE_integer("max_length", None, "Tokens; else what the model is meant for.", 2)
flags.adopt_module_key_flags(model_flags)


def main(argv: list[str]) -> None:
    """Evaluates, prints a table, and writes what is asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    start_distributed()
    with Witness():
        try:
            with jax.set_mesh(model_flags.mesh()):
                table, found = _evaluated()
            if jax.process_index():
                return  # the first process tells what all have found
            if _OUTPUT.value:
                text = json.dumps(found, indent=1, sort_keys=True, default=str) + "\n"
                write_atomically(Path(_OUTPUT.value), text.encode())
            print(table)
        except (ValueError, OSError, CheckpointError) as error:
            sys.exit(f"Nothing was written. {error}")


def _evaluated() -> tuple[str, dict[str, Any]]:
    try:
        from experiments.evaluation.adapter import Harness, Source  # takes seconds, and the harness
        from experiments.evaluation.run import evaluate, table
    except ModuleNotFoundError as error:
        raise ValueError(f"{error.name} is not installed: pip install -e '.[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    source = Source(
        checkpoint=model_flags.checkpoint(),
        ops=model_flags.operations(),
        batch_size=model_flags.batch_size(),
        max_length=_MAX_LENGTH.value,
        tokenizer_file=model_flags.tokenizer_file(),
    )
    found = evaluate(
        Harness(source),
        _TASKS.value,
        _INCLUDE_PATH.value,
        limit=_LIMIT.value,
        num_fewshot=_NUM_FEWSHOT.value,
        apply_chat_template=_CHAT.value,
        fewshot_as_multiturn=_CHAT.value and _MULTITURN.value,
        system_instruction=_SYSTEM.value,
        gen_kwargs=_GEN_KWARGS.value,
        log_samples=_SAMPLES.value,
        bootstrap_iters=_BOOTSTRAP.value,
    )
    return table(found), {"checkpoint": str(source.checkpoint), "precision": model_flags.precision(), **found}


if __name__ == "__main__":
    app.run(main)
