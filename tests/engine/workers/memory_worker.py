"""Launched by test_memory.py: scores with a real shortage of memory, by a limit on this process's addresses."""

import json
import logging
import resource
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import numpy as np  # noqa: E402
import torch  # noqa: E402
from helpers import add_trained_adapter, make_model, make_prompt_completion, make_trainer  # noqa: E402


def main() -> None:
    options = json.loads(sys.argv[1])
    logging.basicConfig(level=logging.WARNING)
    free_mib = options.pop("free_mib")
    long_index = options.pop("long_index", 7)
    long_row, num_layers = options.pop("long_row", 0), options.pop("num_layers", 2)
    pool = make_prompt_completion(options.pop("num_rows", 400), seed=0)
    if long_row:
        pool = pool.map(
            lambda row, i: {"completion": " cat" * long_row} if i == long_index else row, with_indices=True
        )
    model = add_trained_adapter(make_model(hidden_size=64, num_layers=num_layers))
    trainer = make_trainer(
        options.pop("output_dir"), pool, make_prompt_completion(2, seed=1), torch.float32, model=model, **options
    )
    if free_mib:
        # NumPy's BLAS claims its buffers at its first product, and ends the process where it cannot; some
        # processors' small products need none.
        np.ones((512, 512)) @ np.ones((512, 512))
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        limit = used + (free_mib << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    scored = trainer.score_influence()
    print(json.dumps(list(scored["influence"])))


if __name__ == "__main__":
    main()
