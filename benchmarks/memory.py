"""Peak memory of fit and score against the number of rows; each number of rows in a process of its own.

python benchmarks/memory.py [--quick] [--output_dir benchmarks/results]
"""

import argparse
import json
import resource
import tempfile
from pathlib import Path

from common import make_parser, report, set_up
from datasets import load_from_disk
from workload import make_model, make_rows, make_trainer, measure_apart


def measure(folder: Path, num_rows: int, width: int) -> dict[str, float]:
    """Fit and score `num_rows` rows of the dataset in `folder`, by the trainer as users call it."""
    vocab_size = 4096
    rows = load_from_disk(str(folder / "rows")).select(range(num_rows))
    imported = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    held_out = make_rows(32, vocab_size, 16, 32, seed=1)
    model = make_model(width, 4, vocab_size)
    trainer = make_trainer(folder / f"run-{num_rows}", model, rows, held_out, tokens_per_batch=4096)
    scored = trainer.score_influence()
    assert len(scored) == num_rows and None not in scored["influence"]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"imported": imported / 1024, "peak": peak / 1024}


def main() -> None:
    parser = make_parser(__doc__, "Small sizes: shows that it runs, not how much it takes.")
    parser.add_argument("--measure", type=json.loads, help=argparse.SUPPRESS)
    args = set_up(parser)
    if args.measure is not None:
        print(json.dumps(measure(Path(args.measure[0]), *args.measure[1:])))
        return
    sizes, width = ([100, 800], 64) if args.quick else ([1000, 2000, 4000, 8000], 256)
    table: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        make_rows(max(sizes), 4096, 16, 32).save_to_disk(f"{folder}/rows")
        for num_rows in sizes:
            found = measure_apart(__file__, [folder, num_rows, width])
            first = table[0] if table else None
            above = found["peak"] - found["imported"]
            table.append(
                {
                    "rows": num_rows,
                    "peak MiB": found["peak"],
                    "ratio": found["peak"] / first["peak MiB"] if first else 1.0,
                    "peak above imports MiB": above,
                    "its ratio": above / first["peak above imports MiB"] if first else 1.0,
                    "target": "ratio <= 1.05" if num_rows == sizes[-1] else "",
                }
            )
    report("memory", table, args.output_dir)


if __name__ == "__main__":
    main()
