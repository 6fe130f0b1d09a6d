"""Benchmarks of lm-eval (MMLU and friends) for a model in memory, with its adapter or without one.

lm-eval comes with the extra `eval`. It is imported where it is used, which takes seconds.
"""

import difflib
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_in2core.progress import get_bar_settings


logger = logging.getLogger(__name__)

# lm-eval's own seed of the examples that a task without an order of its own draws.
FEWSHOT_SEED = 1234


def check_task_settings(
    names: Sequence[str], include_path: str | None = None, num_fewshot: int | None = None, limit: float | None = None
) -> None:
    """
    Check what can be checked without importing lm-eval.

    Args:
        names, include_path, num_fewshot:
            See [`load_tasks`].
        limit (`float`, *optional*):
            See [`evaluate_tasks`].

    Raises:
        ValueError: lm-eval is not installed, `include_path` is no folder with YAML files, or a number is out of range.
    """
    if find_spec("lm_eval") is None:
        raise ValueError(
            f"The task(s) {', '.join(names)} need lm-eval, which is not installed: `pip install 'hf-in2core[eval]'`."
        )
    if include_path is not None and not any(Path(include_path).expanduser().glob("**/*.yaml")):
        raise ValueError(
            f"include_path={include_path} is no folder with task files (*.yaml), seen from {Path.cwd()}. Files of "
            "MMLU become such a folder with recipes/mmlu/make_tasks.py of a clone."
        )
    if num_fewshot is not None and num_fewshot < 0:
        raise ValueError(f"num_fewshot={num_fewshot} is negative. It is the number of examples before each question.")
    if limit is not None and (limit <= 0 or (limit > 1 and limit != int(limit))):
        raise ValueError(
            f"limit={limit} is neither a number of questions per task (10) nor a share of them (0.1). Leave it out "
            "for all."
        )


def load_tasks(
    names: Sequence[str], include_path: str | None = None, num_fewshot: int | None = None
) -> dict[str, dict[str, Any]]:
    """
    Load tasks of lm-eval and their data, so that what cannot be evaluated fails before any long work.

    Args:
        names (`Sequence[str]`):
            Tasks, groups or tags, such as `["mmlu"]`.
        include_path (`str`, *optional*):
            Folder with task files (YAML). The tasks are then those of this folder alone, so that nothing is fetched
            that it does not name. By default those that lm-eval ships, whose data lie on the Hub.
        num_fewshot (`int`, *optional*):
            Examples before each question; by default what the task says, else none. A task that fixes it to 0 keeps 0.

    Returns:
        `dict[str, dict]`: for each name what lm-eval's `TaskManager.load` returns: `tasks` and `groups`.

    Raises:
        ValueError: as [`check_task_settings`]; no such task; a task has fewer examples than `num_fewshot`.
    """
    check_task_settings(names, include_path, num_fewshot)
    from lm_eval.tasks import TaskManager

    folder = None if include_path is None else str(Path(include_path).expanduser())
    manager = TaskManager(include_path=folder, include_defaults=folder is None)
    where = f"include_path={include_path}" if folder is not None else f"lm-eval {version('lm-eval')}"
    if unknown := [name for name in names if name not in manager.task_index]:
        close = difflib.get_close_matches(unknown[0], manager.all_tasks, n=3) or manager.all_tasks[:5]
        raise ValueError(
            f"There is no task {', '.join(unknown)} in {where}"
            + (f"; it has {', '.join(close)}{', …' if len(manager.all_tasks) > len(close) else ''}." if close else ".")
        )
    loaded = {name: dict(manager.load([name])) for name in dict.fromkeys(names)}
    for found in loaded.values():
        for name, task in found["tasks"].items():
            _set_fewshot(name, task, num_fewshot)
    return loaded


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    """As lm-eval's `simple_evaluate` does."""
    fixed = task.get_config("num_fewshot")
    wanted = fixed or 0 if num_fewshot is None or fixed == 0 else num_fewshot
    task.set_config(key="num_fewshot", value=wanted)
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    if wanted > 0 and wanted > (available := len(list(task.fewshot_docs()))):
        raise ValueError(
            f"num_fewshot={wanted}, but the task {name} has {available} examples to show. Give at most as many."
        )


def evaluate_tasks(
    model: PreTrainedModel,
    processing_class: PreTrainedTokenizerBase,
    tasks: Mapping[str, Mapping[str, Any]],
    *,
    limit: float | None = None,
    batch_size: int = 8,
    autocast: torch.dtype | None = None,
    show_progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """
    Evaluate a model on tasks of lm-eval, the questions shared out among the processes.

    Args:
        model ([`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            The model on this process's device.
        processing_class (`transformers.PreTrainedTokenizerBase`):
            Its tokenizer.
        tasks (`Mapping[str, Mapping]`):
            From [`load_tasks`]; the same for every model that is compared.
        limit (`float`, *optional*):
            The first so many questions of each task (of each subject of a group; 1 is one question), or a share of
            them in (0, 1).
        batch_size (`int`, *optional*, defaults to `8`):
            Questions (or answers, where they are longer than a token) in a batch of a process.
        autocast (`torch.dtype`, *optional*):
            Mixed precision of the forward.
        show_progress (`bool`, *optional*, defaults to `True`):
            Whether to show lm-eval's bars (main process only; one line a minute outside a terminal).

    Returns:
        `dict[str, dict]`, the same on every process. For each name, ready for JSON:

        - `metrics` (`dict[str, float]`): such as `{"acc": 0.31}`, in the task's own order; empty for a tag or a group
          that is not summed up. `stderr` (`dict[str, float]`): their standard errors over questions.
        - `questions` (`int`), `num_fewshot` (`int`), `limit` (`float`, *optional*), `version` (`str`, *optional*) of
          the task and `lm_eval` (`str`), that of the library.
        - `cut_prompts` (`int`): prompts that were longer than the model's context and lost their beginning.
        - `subtasks` (`dict[str, dict]`): `metrics`, `stderr` and `questions` of the members of a group.

    Raises:
        ValueError: a task has fewer questions than there are processes.
    """
    import lm_eval

    state = PartialState()
    for found in tasks.values():
        for name, task in found["tasks"].items():
            count = len(task.eval_docs)
            if limit is not None:
                count = min(count, math.ceil(limit * count) if limit < 1 else int(limit))
            if count < state.num_processes:
                raise ValueError(
                    f"The task {name} has {count} question(s) for {state.num_processes} processes, and lm-eval needs "
                    "one for each. Raise the limit, or start fewer processes."
                )
    results = {}
    with _quiet_lm_eval(show_progress and state.is_main_process) as cut_prompts:
        language_model = _wrap(model, processing_class, batch_size, autocast)
        for name, found in tasks.items():
            cut_prompts.clear()
            output = lm_eval.evaluate(language_model, task_dict=dict(found), limit=limit, log_samples=False)
            num_cut = torch.tensor(len(cut_prompts), device=state.device)
            if state.num_processes > 1:
                num_cut = Accelerator().reduce(num_cut, "sum")
            result = None if output is None else _read_output(output, name, limit) | {"cut_prompts": int(num_cut)}
            results[name] = broadcast_object_list([result])[0] if state.num_processes > 1 else result
            if int(num_cut) and state.is_main_process:
                logger.warning(
                    "%d prompts of %s are longer than the model's %d tokens; their beginning (the first examples) was "
                    "cut off. Use a smaller `num_fewshot`.",
                    int(num_cut),
                    name,
                    language_model.max_length,
                )
    return results  # type: ignore[return-value]


def _wrap(model: Any, processing_class: PreTrainedTokenizerBase, batch_size: int, autocast: torch.dtype | None) -> Any:
    from lm_eval.models.huggingface import HFLM

    class OneOfSeveral(HFLM):  # HFLM takes a model that is in memory for that of a single process.
        accelerator = Accelerator()
        rank = property(lambda _: PartialState().process_index)
        world_size = property(lambda _: PartialState().num_processes)

    return OneOfSeveral(
        pretrained=model, tokenizer=processing_class, batch_size=batch_size, mixed_precision_dtype=autocast
    )


def _read_output(output: Any, name: str, limit: float | None) -> dict[str, Any]:
    """lm-eval's results of one task, group or tag."""
    results = output["results"] | (output.get("groups") or {})
    subtasks = {
        member: _read_metrics(output["results"][member]) | {"questions": count["effective"]}
        for member, count in output["n-samples"].items()
    }
    task_version = output["versions"].get(name)
    return {
        **_read_metrics(results.get(name, {})),
        "questions": sum(member["questions"] for member in subtasks.values()),
        "num_fewshot": max(output["n-shot"].values()),
        "limit": limit,
        "version": None if task_version is None else str(task_version),
        "lm_eval": version("lm-eval"),
        "subtasks": {} if list(subtasks) == [name] else subtasks,
    }


def _read_metrics(result: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Figures by metric; lm-eval's keys are `metric,filter` and `metric_stderr,filter`."""
    metrics: dict[str, float] = {}
    stderr: dict[str, float] = {}
    for key, value in result.items():
        metric, comma, used_filter = key.partition(",")
        if not comma or isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            continue
        suffix = "" if used_filter == "none" else f" ({used_filter})"
        if metric.endswith("_stderr"):
            stderr[metric.removesuffix("_stderr") + suffix] = float(value)
        else:
            metrics[metric + suffix] = float(value)
    return {"metrics": metrics, "stderr": stderr}


@contextmanager
def _quiet_lm_eval(show_progress: bool) -> Iterator[list[str]]:
    """
    lm-eval's bars as ours are, and its warnings of what is meant, or said once for each prompt, away.

    Yields a list that gains an entry for every prompt that is cut.
    """
    from lm_eval.api import model as model_module
    from lm_eval.api import task as task_module
    from lm_eval.models import huggingface

    def show(*args: Any, **kwargs: Any) -> tqdm:
        return tqdm(*args, **kwargs | get_bar_settings(show_progress and not kwargs.get("disable"), brief=True))

    cut_prompts: list[str] = []

    def keep(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if message.startswith("Combined length of context"):
            cut_prompts.append(message)
        return not message.startswith(("Combined length", "`pretrained` model kwarg", "Passed an already-initialized"))

    # lm-eval has no switch for them.
    modules: list[Any] = [huggingface, model_module, task_module]
    before = [module.tqdm for module in modules]
    huggingface.eval_logger.addFilter(keep)
    for module in modules:
        module.tqdm = show
    try:
        yield cut_prompts
    finally:
        huggingface.eval_logger.removeFilter(keep)
        for module, bar in zip(modules, before, strict=True):
            module.tqdm = bar
