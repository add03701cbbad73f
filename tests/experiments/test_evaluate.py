"""`python -m experiments.evaluate`: the harness asks, and gets what the model says."""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.utils import get_rolling_token_windows

from dsv3_jax import ops
from experiments import scoring
from experiments.evaluation.adapter import Harness, Source
from experiments.evaluation.run import TASKS, evaluate
from tests.conftest import mesh_of
from tests.experiments.conftest import WORDS

OPERATIONS = ops.float32()


@pytest.fixture(scope="module", autouse=True)
def as_they_are():
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.set_mesh(mesh_of(1, 1)):
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def lm(checkpoint):
    return Harness(Source(checkpoint, OPERATIONS, batch_size=4, max_length=32))


def asked(kind, *arguments):
    return [Instance(kind, {}, a, 0) for a in arguments]


def logprobs(lm, ids):
    """All log p of the tokens after each of some ids, by one sequence for each: [ids - 1, W]."""
    rows = [np.array([*ids[:n], word]) for n in range(1, len(ids)) for word in range(lm.c.vocab)]
    found = [row.logprobs[-1] for row in lm.scorer.score(rows)]
    return np.reshape(found, (len(ids) - 1, lm.c.vocab))


def test_a_continuation_has_the_sum_of_its_tokens_and_is_greedy_if_all_are_the_likeliest(lm):
    context = lm.tok_encode("the quick")
    for _ in range(3):  # the likeliest, token by token
        context = [*context, int(np.argmax(logprobs(lm, [*context, 0])[-1]))]
    start = len(context) - 3
    changed = [*context[:-1], (context[-1] + 1) % 290]
    table = logprobs(lm, context)
    pairs = [(("", ""), ids[:start], ids[start:]) for ids in (context, changed)]
    (right, greedy), (wrong, not_greedy) = lm._loglikelihood_tokens(pairs)
    assert (greedy, not_greedy) == (True, False)
    want = [table[n - 1][context[n]] for n in range(start, len(context))]
    assert right == pytest.approx(sum(want), abs=1e-4)
    assert wrong == pytest.approx(sum(want[:-1]) + table[-1][changed[-1]], abs=1e-4)


def test_a_whole_text_is_scored_once_in_windows_of_the_harness(lm):
    text = " ".join([WORDS] * 4)
    ids = lm.tok_encode(text)
    assert len(ids) > 2 * lm.max_length  # several windows
    total = 0.0
    for inputs, scored in get_rolling_token_windows(ids, lm.prefix_token_id, lm.max_length, 1):
        (found,) = lm.scorer.score([np.array([*inputs, scored[-1]])])
        total += found.logprobs[-len(scored) :].sum()
    other, got = lm.loglikelihood_rolling(asked("loglikelihood_rolling", ("fox",), (text,)))
    assert got == pytest.approx(total, abs=1e-3) and other > got


def test_a_context_that_is_too_long_loses_its_beginning(lm):
    ids = np.random.default_rng(0).integers(6, 290, 60).tolist()
    (long, _), (cut, _) = lm._loglikelihood_tokens([(None, ids, [7, 8]), (None, ids[-31:], [7, 8])])
    assert long == pytest.approx(cut, abs=1e-5)
    with pytest.raises(ValueError, match="33 tokens, but from 1 to 32"):
        lm._loglikelihood_tokens([(None, [1], [5] * 33)])


def test_texts_end_at_their_own_stop_strings_and_lengths(lm):
    plain = {"until": [], "max_gen_toks": 12}
    (whole,) = lm.generate_until(asked("generate_until", (WORDS, plain)))
    assert len(whole) > 4
    stop = whole[3:5]
    many = [(WORDS, plain), (WORDS, {**plain, "until": [stop]}), (WORDS, {**plain, "max_gen_toks": 2})]
    many.append(("fox", {**plain, "do_sample": True, "temperature": 1.0, "top_k": 5}))
    texts = lm.generate_until(asked("generate_until", *many))
    assert texts[0] == whole and texts[1] == whole.split(stop)[0]
    assert whole.startswith(texts[2]) and len(texts[2]) < len(whole)
    # All of it again, in another place: seeds follow the order of what is asked.
    assert lm.generate_until(asked("generate_until", *many)) == texts
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until(asked("generate_until", ("a", {**plain, "num_beams": 4})))
    with pytest.raises(ValueError, match="asks for 32 tokens"):
        lm.generate_until(asked("generate_until", ("a", {**plain, "max_gen_toks": 32})))


def test_nothing_is_compiled_anew_for_further_questions(lm):
    compiled = scoring._score._cache_size()
    lengths = np.random.default_rng(1).integers(2, 30, 40)
    lm._loglikelihood_tokens([(None, [5] * int(n), [6, 7]) for n in lengths])
    assert scoring._score._cache_size() <= max(compiled, 2)  # widths 16 and 32, of which some were there


def test_conversations_go_through_the_template(lm):
    turns = [{"role": "system", "content": "be"}, {"role": "user", "content": "fox"}]
    text = lm.apply_chat_template(turns)
    assert text.endswith("befox") and lm.tok_encode(text)[0] == lm.text.bos
    assert lm.apply_chat_template(turns, add_generation_prompt=False) == text
    assert "bos_token" in lm.chat_template(True) and lm.chat_template(False) is None
    assert lm.text.digest[:16] in lm.tokenizer_name


def test_questions_are_held_out_and_the_same_each_time():
    sys.path.insert(0, str(TASKS))
    try:
        import stdlib
    finally:
        sys.path.remove(str(TASKS))
    for make in (stdlib.next_line, stdlib.fill_in_middle):
        first, again = make()["test"], make()["test"]
        assert first.to_list() == again.to_list() and len(first) == 200
        assert all(len(set(q["choices"])) == 4 for q in first)
        assert len({q["answer"] for q in first}) == 4
    for question in stdlib.fill_in_middle()["test"]:
        assert question["choices"][question["answer"]] == question["middle"]


def test_a_task_of_the_user_runs_on_its_own_data(lm, tmp_path):
    lines = [{"q": "the quick", "choices": [" brown", " lazy", " zebra"], "a": n % 3} for n in range(6)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "mine.yaml").write_text(
        "task: mine\noutput_type: multiple_choice\ndataset_path: json\ntest_split: test\n"
        f"dataset_kwargs:\n  data_files:\n    test: {tmp_path / 'data.jsonl'}\n"
        'doc_to_text: "{{q}}"\ndoc_to_choice: choices\ndoc_to_target: a\ntarget_delimiter: ""\n'
    )
    found = evaluate(lm, ["mine"], [str(tmp_path)], bootstrap_iters=0)
    # All ask the same, and each answer is right for two of the six.
    assert found["results"]["mine"]["acc,none"] == pytest.approx(1 / 3)
    (tmp_path / "lost.yaml").write_text("task: lost\ndataset_path: nobody/nothing\ntest_split: test\n")
    with pytest.raises(ValueError, match=r"The task lost cannot be made .* put its data"):
        evaluate(lm, ["lost"], [str(tmp_path)])


def test_the_command_evaluates_and_says_what_is_wrong_in_one_sentence(checkpoint, tmp_path):
    def command(*arguments):
        line = [sys.executable, "-m", "experiments.evaluate", f"--checkpoint={checkpoint}", *arguments]
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
        return subprocess.run(line, capture_output=True, text=True, timeout=600, env=environment)

    out = tmp_path / "out.json"
    tasks = "--tasks=stdlib_next_line,stdlib_fill_in_middle"
    done = command(
        tasks, "--limit=2", "--num_fewshot=1", f"--output={out}", "--mesh_expert=2", "--log_samples"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["results"]["stdlib_next_line"]["acc,none"] in (0.0, 0.5, 1.0)
    assert found["n-shot"]["stdlib_next_line"] == 1
    assert "stdlib_fill_in_middle" in done.stdout and len(found["samples"]["stdlib_next_line"]) == 2
    wrong = command("--mesh_data=2", "--mesh_expert=3")
    assert wrong.returncode == 1 and "Nothing was written." in wrong.stderr
    assert "Traceback" not in wrong.stderr
