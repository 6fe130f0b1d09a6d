"""The gradient index: its room on the disk, its rounding, and what a second validation set costs with it.

    python benchmarks/index.py [--quick] [--model FOLDER --pool FILE --validation FILE --second FILE]

Times: the trainer on a random model of width 256 with four layers, with its checks and files, a trainer of its own for
each run; the second validation set is scored anew, or from an index that the first one left. Rounding: the scores of a
trained reference by an index in each precision, against those without one; by default the quickstart's rows and a
small sibling of its model. Beside them scales for other numbers of elements than the library's.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from common import make_parser, print_table, set_up, write_results
from datasets import Dataset
from fidelity import share_kept
from peft import PeftModel
from plain_training import Schedule, find_sources, prepare_source, train_on
from scipy.stats import spearmanr
from workload import make_model, make_topics, make_trainer, measure_error

from hf_in2core import InfluenceTrainer
from hf_in2core.engine import encoding


PRECISIONS = {"float32": 4.0, "bfloat16": 2.0, "int8": 1.05}
# Elements that share a scale in 8 bits; so many as a block has none of: one scale for each row of a block.
GROUPS = {"one scale for each row and block": 2**30}


@contextmanager
def grouped(size: int) -> Iterator[None]:
    """Other groups of elements that share a scale than the library's."""
    usual = encoding.GROUP
    encoding.GROUP = size
    try:
        yield
    finally:
        encoding.GROUP = usual


class Runs:
    """Trainers of one model and pool, each in folders of its own."""

    def __init__(self, folder: Path, model: PeftModel, pool: Dataset) -> None:
        self.folder, self.model, self.pool = folder, model, pool
        self.elements = sum(tensor.numel() for tensor in model.parameters() if tensor.requires_grad)

    def start(self, name: str, held_out: Dataset, index: str = "", bytes_each: float = 0.0) -> InfluenceTrainer:
        """A trainer whose index, if it is to have one, may take so many bytes for each element of each row."""
        options: dict[str, Any] = {}
        if index:
            room = bytes_each * self.elements * len(self.pool) / 1e9
            options = {"gradient_store_dir": str(self.folder / index), "gradient_store_gb": room}
        settings = {"fit_examples": None, **options}
        return make_trainer(self.folder / name, self.model, self.pool, held_out, **settings)

    def measure_bytes(self, index: str) -> int:
        """Bytes of an index on the disk."""
        return sum(path.stat().st_size for path in (self.folder / index).rglob("*.safetensors"))


def time_runs(folder: Path, num_rows: int) -> list[dict[str, Any]]:
    """Seconds of the first and the second validation set, anew and from an index."""
    pool, first, second = (make_topics(rows, 1024, 80, seed) for seed, rows in enumerate((num_rows, 50, 50)))
    runs = Runs(folder, make_model(256, 4, vocab_size=1024), pool)
    found: dict[str, float] = {}

    def run(name: str, trainer: InfluenceTrainer, per_example: bool = False) -> None:
        started = time.process_time()
        trainer.fit_influence(per_example)
        trainer.score_influence()
        found[name] = time.process_time() - started

    run("not counted", runs.start("warm", second))
    run("no index, a validation set", runs.start("anew", second))
    run("no index, 50 queries", runs.start("anew-queries", second), True)
    for name, room in PRECISIONS.items():
        run(f"{name}, the first set, which fills it", runs.start(f"first-{name}", first, name, room))
        run(f"{name}, a second set", runs.start(f"second-{name}", second, name, room))
        run(f"{name}, 50 queries", runs.start(f"queries-{name}", second, name, room), True)
    del found["not counted"]
    anew = {queries: found[f"no index, {queries}"] for queries in ("a validation set", "50 queries")}
    return [
        {"what": name, "CPU s": seconds}
        | {"of scoring anew": seconds / anew.get(name.partition(", ")[2], anew["a validation set"])}
        for name, seconds in found.items()
    ]


def measure_rounding(folder: Path, args: Any) -> list[dict[str, Any]]:
    """Disk and error of an index of a trained reference's gradients, in each precision."""
    find_sources(args, "model", ("pool", "validation"))
    second = args.second or args.validation
    pool = prepare_source(args.pool, "pool", args.model)
    if args.quick:
        pool = pool.select(range(48))
    sets = [prepare_source(source, "validation", args.model) for source in (args.validation, second)]
    steps = 4 if args.quick else 100
    schedule = Schedule(steps, 16, warmup_steps=max(steps // 10, 1))
    model = train_on(args.model, pool, np.arange(len(pool)), schedule, 0)
    runs = Runs(folder, model, pool)
    exact = np.array(runs.start("exact", sets[1]).score_influence()["influence"])
    rows = []

    def measure(name: str, room: float) -> None:
        runs.start(f"first-{name}", sets[0], name, room).score_influence()
        trainer = runs.start(f"second-{name}", sets[1], name, room)
        scores = np.array(trainer.score_influence()["influence"])
        config = trainer.fit_influence().config
        rows.append(
            {
                "index": name,
                "bytes per row": runs.measure_bytes(name) / len(pool),
                "bytes per element": runs.measure_bytes(name) / len(pool) / runs.elements,
                "relative error of the scores": measure_error(scores, exact),
                "Spearman of the scores": float(spearmanr(scores, exact).statistic),
                "same strongest quarter": share_kept(scores, exact, len(exact) // 4),
                "store_error": config.store_error,
                "store_agreement": config.store_agreement,
            }
        )

    for name, room in PRECISIONS.items():
        measure(name, room)
    for name, size in GROUPS.items():
        with grouped(size):
            measure(f"int8, {name}", 1.2)
    return rows


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not what it takes.")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--pool")
    parser.add_argument("--validation")
    parser.add_argument("--second", help="Another validation set; the same by default.")
    args = set_up(parser)
    with tempfile.TemporaryDirectory() as folder:
        rounding = measure_rounding(Path(folder), args)
        print_table("Rounding", rounding)
    with tempfile.TemporaryDirectory() as folder:
        times = time_runs(Path(folder), 100 if args.quick else 1000)
        print_table("Times", times)
    write_results(args.output_dir / "index.json", rounding=rounding, times=times)


if __name__ == "__main__":
    main()
