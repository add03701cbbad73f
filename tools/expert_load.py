"""Which experts serve which kinds of text: `python -m tools.expert_load --checkpoint=DIR --output=PNG`.

Domains are `--domain=NAME=GLOB`, given several times, of text, JSONL, Parquet or ArrayRecord; without any,
kinds of the standard library's text. What is drawn is defined in `experiments/evaluation/domains.py`.
"""

import json
import sys
from pathlib import Path

import jax
from absl import app, flags

from dsv3_jax.data import fill_in_middle
from dsv3_jax.training import charts
from dsv3_jax.training.metrics import write_atomically
from dsv3_jax.training.restore import CheckpointError
from experiments import model_flags
from experiments.evaluation import domains
from experiments.scoring import Scorer

_DOMAIN = flags.DEFINE_multi_string("domain", [], "NAME=GLOB; give several.")
_OUTPUT = flags.DEFINE_string("output", "expert_load.png", "The picture to draw.")
_JSON = flags.DEFINE_string("json", None, "Where to write the counts.")
_LAYER = flags.DEFINE_multi_integer("layer", [], "A layer of the model to draw; else all that are routed.")
_TOKENS = flags.DEFINE_integer("tokens", 1 << 15, "To read of each domain at most.", lower_bound=1)
flags.adopt_module_key_flags(model_flags)


def main(argv: list[str]) -> None:
    """Counts, draws, and writes what is asked for."""
    if len(argv) > 1:
        raise app.UsageError(f"{argv[1]!r} is no flag; see --help.")
    try:
        with jax.set_mesh(model_flags.mesh()):
            _draw(model_flags.checkpoint())
    except (ValueError, OSError, CheckpointError) as error:
        sys.exit(f"Nothing was drawn. {error}")


def _draw(checkpoint: Path) -> None:
    texts = dict(map(_domain, _DOMAIN.value)) or domains.of_library()
    text = model_flags.tokenizer()
    scorer = Scorer.load(checkpoint, model_flags.batch_size(), model_flags.operations())
    c = scorer.c
    text.check_fits(c.vocab)
    routed = range(c.dense_layers, c.layers)
    layers = _LAYER.value or list(routed)
    wrong = [layer for layer in layers if layer not in routed]
    if wrong or not routed:
        raise ValueError(f"Layers {wrong} are not routed: those from {c.dense_layers} to {c.layers - 1} are.")
    found = domains.loads(scorer, texts, lambda t: fill_in_middle.whole(t, text), _TOKENS.value, c.max_length)
    relative = {name: load.relative for name, load in found.items()}
    charts.draw_domains(
        Path(_OUTPUT.value),
        {layer: {name: rows[layer - c.dense_layers] for name, rows in relative.items()} for layer in layers},
        f"Relative expert load by domain: {checkpoint.name}",
    )
    if _JSON.value:
        record = {
            name: {"tokens": load.tokens, "chosen": load.chosen.tolist(), "relative": load.relative.tolist()}
            for name, load in found.items()
        }
        first = {"first_routed_layer": c.dense_layers, "experts": c.experts, "top_k": c.top_k}
        write_atomically(Path(_JSON.value), json.dumps({**first, "domains": record}, indent=1).encode())
    for name, load in found.items():
        busiest = ", ".join(f"{row.max():.2f}" for row in load.relative)
        print(f"{name}: {load.tokens} tokens; the busiest expert of each layer does {busiest} x its share.")


def _domain(given: str) -> tuple[str, domains.Texts]:
    name, split, path = given.partition("=")
    if not (name and split and path):
        raise ValueError(f"--domain={given} is not NAME=GLOB: write it as code='src/**/*.py'.")
    return name, domains.of(path)


if __name__ == "__main__":
    app.run(main)
