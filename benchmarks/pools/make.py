"""Make a pool on which selectors are compared: rows, settings of `in2core run`, and a model where none is given.

    python benchmarks/pools/make.py --pool conventions --output_dir runs/pools/conventions [--seed 0]
    in2core run --config runs/pools/conventions/in2core.yaml
    python benchmarks/pools/make.py --list

README.md beside this file says what each pool is for.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.pools.generated import GENERATED
from benchmarks.pools.pool import Pool, write_pool
from benchmarks.pools.shared_data import FROM_SHARED


POOLS = {**GENERATED, **FROM_SHARED}


def make_pool(name: str, seed: int, shared: Path) -> Pool:
    """The rows and settings of a pool."""
    return GENERATED[name](seed) if name in GENERATED else FROM_SHARED[name](seed, shared)


def find_pool(name: str, seed: int, shared: Path) -> Path:
    """The folder of a pool, made where it is not there yet."""
    folder = Path("runs/pools") / (name if seed == 0 else f"{name}-{seed}")
    if not folder.is_dir():
        write_pool(make_pool(name, seed, shared), folder, seed)
    return folder


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--pool", choices=list(POOLS))
    parser.add_argument("--output_dir", type=Path, help="Folder to make; it appears when complete.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shared", type=Path, default=Path("../shared/data"), help="Data outside the project.")
    parser.add_argument("--list", action="store_true", help="Name the pools and leave.")
    args = parser.parse_args(argv)
    if args.list:
        for name, function in POOLS.items():
            source = "generated" if name in GENERATED else "shared data"
            print(f"{name:17} {source:12} {(function.__doc__ or '').strip()}")
        return
    if args.pool is None or args.output_dir is None:
        parser.error("give --pool and --output_dir, or --list")
    try:
        write_pool(make_pool(args.pool, args.seed, args.shared), args.output_dir, args.seed)
    except (FileNotFoundError, FileExistsError) as error:
        parser.error(str(error))
    print(f"Wrote {args.output_dir}. Next: in2core run --config {args.output_dir}/in2core.yaml")


if __name__ == "__main__":
    main()
