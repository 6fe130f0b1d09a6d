"""Trained reference models that several benchmarks read, one for each seed; made once and found again."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from hf_in2core import InfluenceConfig, InfluenceTrainer
from hf_in2core.pipeline.arguments import In2CoreArguments
from hf_in2core.pipeline.job import Job, check
from hf_in2core.pipeline.parser import Settings
from hf_in2core.pipeline.steps import train_reference
from hf_in2core.pipeline.training import make_influence_trainer


# What `--quick` takes of a reference.
REFERENCE_QUICK = ("--reference_max_steps", "5", "--reference_warmup_steps", "1")


def train_references(settings: Settings) -> Iterator[tuple[int, Job, str]]:
    """Seed, checked run and adapter of each reference, trained under `output_dir/seed-<seed>` or found there."""
    args: In2CoreArguments = settings.arguments
    for seed in args.seeds:
        folder = str(Path(args.output_dir or "") / f"seed-{seed}")
        arguments = type(args)(**vars(args) | {"output_dir": folder})
        job = check(Settings(arguments, settings.values | {"output_dir": folder, "seed": seed}))
        adapter, _ = train_reference(job)
        yield seed, job, adapter


def make_trainer(
    job: Job, adapter: str, validation: Dataset | dict[str, Dataset] | None = None, **options: object
) -> InfluenceTrainer:
    """An InfluenceTrainer of a trained reference; `options` are fields of [`InfluenceConfig`]."""
    args = job.settings.make(InfluenceConfig, reference=True, **options)
    rows = (job.inputs.pool, job.inputs.validation if validation is None else validation, job.reference_tokenizer)
    return make_influence_trainer(job.reference_model, args, adapter, *rows)
