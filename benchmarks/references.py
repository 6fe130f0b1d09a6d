"""Trained reference models that several benchmarks read, one for each seed; made once and found again."""

from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from hf_in2core import InfluenceConfig, InfluenceTrainer  # noqa: E402
from hf_in2core.pipeline.arguments import In2CoreArguments  # noqa: E402
from hf_in2core.pipeline.job import Job, check  # noqa: E402
from hf_in2core.pipeline.parser import Settings, make_run_parser  # noqa: E402
from hf_in2core.pipeline.run_folder import join_processes, quiet_loading, run_setup_script  # noqa: E402
from hf_in2core.pipeline.steps import train_reference  # noqa: E402
from hf_in2core.pipeline.training import load_model  # noqa: E402


def parse_settings(argv: list[str], quick: bool) -> Settings:
    """
    The recipe's settings from its flags: by default the quickstart's data, made on the spot, and three seeds.

    `quick` takes one seed and 5 steps.
    """
    defaults = [] if "--config" in argv else ["--config", "recipes/quickstart/in2core.yaml"]
    if "--output_dir" not in argv:
        defaults += ["--output_dir", f"runs/benchmarks/references{'_quick' if quick else ''}"]
    if quick:
        defaults += ["--seeds", "0", "--reference_max_steps", "5", "--reference_warmup_steps", "1"]
    settings = make_run_parser().parse([*defaults, *argv])
    join_processes(settings)
    if settings.arguments.setup_script is not None:
        run_setup_script(settings.arguments.setup_script)
    return settings


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
    with quiet_loading():
        return InfluenceTrainer(
            model=load_model(job.reference_model, args, adapter),
            args=args,
            train_dataset=job.inputs.pool,
            eval_dataset=job.inputs.validation if validation is None else validation,
            processing_class=job.reference_tokenizer,
        )
