"""Runs tasks of lm-evaluation-harness; nothing is downloaded unless the environment asks for it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
    os.environ.setdefault(name, "1")  # read when the harness is imported
os.environ.setdefault("DISABLE_MULTIPROC", "1")  # standard errors by processes that JAX's threads would hang

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

TASKS = Path(__file__).parent / "tasks"

_KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


def evaluate(
    lm: LM, names: Sequence[str], include_path: Sequence[str] = (), **options: Any
) -> dict[str, Any]:
    """The results of tasks, groups and tags by name: ours, the user's, and the harness's own.

    Args:
        include_path: folders of the user's own tasks.
        options: of `lm_eval.evaluator.simple_evaluate`.

    Raises:
        ValueError: if there is no such task, or its data is not at hand.
    """
    manager = _tasks(names, include_path)
    tasks = [task for name in names for task in _loaded(manager, name)]
    found: Any = evaluator.simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)
    return {key: found[key] for key in (*_KEPT, "samples") if key in found}


def table(found: dict[str, Any]) -> str:
    """Results for a person: a line for each metric, with its standard error where there is one."""
    lines = []
    for name, values in (*found["results"].items(), *found.get("groups", {}).items()):
        for key, value in sorted(values.items()):
            metric, _, kind = key.partition(",")
            if kind and not metric.endswith("_stderr") and isinstance(value, float):
                error = values.get(f"{metric}_stderr,{kind}")
                margin = f" +- {error:.4g}" if isinstance(error, float) else ""
                lines.append(f"{name:<32} {metric:<20} {value:.6g}{margin}")
    return "\n".join(lines)


def _tasks(names: Sequence[str], include_path: Sequence[str]) -> TaskManager:
    """All tasks that may be meant; the harness's own take seconds to list."""
    paths: list[str | Path] = [TASKS, *include_path]
    manager = TaskManager(include_path=paths, include_defaults=False)
    if set(names) <= set(manager.all_tasks):
        return manager
    manager = TaskManager(include_path=paths)
    unknown = sorted(set(names) - set(manager.all_tasks))
    if unknown:
        ours = ", ".join(TaskManager(include_path=str(TASKS), include_defaults=False).all_tasks)
        raise ValueError(
            f"There is no task {unknown[0]!r}: choose one of lm-evaluation-harness, of --include_path, or of "
            f"{ours}."
        )
    return manager


def _loaded(manager: TaskManager, name: str) -> list[Any]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # whatever a data set's own code and its library raise
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"The task {name} cannot be made ({type(error).__name__}: {reason}): put its data where the "
            "datasets library finds it, or set HF_HUB_OFFLINE=0 and HF_DATASETS_OFFLINE=0 to have it fetched."
        ) from error
    return list(loaded.get("groups", {}).values()) or list(loaded["tasks"].values())
