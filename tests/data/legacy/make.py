"""Make the files beside this script, as commit eecc9d2 writes them; later versions must still load them.

Run it from a checkout of that commit, with a Python that has its dependencies, into a folder without a run:

    cd CHECKOUT && OMP_NUM_THREADS=1 python /path/to/make.py /path/to/output

Everything works on the CPU with paths relative to the output folder and on a Hub on 127.0.0.1; nothing is downloaded.
Who loads a scorer from here does so with the output folder as working directory, since its base model is
`inputs/model`, or passes `model=`.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


ROOT, OUT = Path.cwd(), Path(sys.argv[1]).resolve()
TOKEN = "hf_" + "T" * 34
REPO_ID = "ada/legacy"
CPU = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
os.environ |= CPU
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from hub_client import check_that_tokens_stayed_secret, make_env  # noqa: E402
from loopback_hub import LoopbackHub  # noqa: E402


# Scores of the pool by the run's scorer, in `scores.json`.
SCORES = """
import json
import numpy as np
from datasets import load_dataset, load_from_disk
from hf_in2core import InfluenceScorer

pool = load_dataset("json", data_files="inputs/pool.jsonl", split="train")
scored = load_from_disk("run/scored")
mapped = pool.map(InfluenceScorer.from_pretrained("run/scorer"), batched=True)
assert scored["id"][:] == mapped["id"][:] == pool["id"][:]
assert scored["num_loss_tokens"][:] == mapped["num_loss_tokens"][:]
found = {"id": pool["id"][:], "scored": scored["influence"][:], "mapped": mapped["influence"][:]}
assert np.isfinite(found["scored"] + found["mapped"]).all()
with open("scores.json", "w") as file:
    json.dump(found, file, indent=1)
print("scored and mapped differ by", np.abs(np.subtract(found["scored"], found["mapped"])).max())
"""
# A scorer of two named validation sets, in `scorer_named/`, and its scores in `scores_named.json`.
NAMED = """
import json, sys
import numpy as np
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from hf_in2core import InfluenceConfig, InfluenceScorer, InfluenceTrainer

def load(name):
    return load_dataset("json", data_files=f"inputs/{name}.jsonl", split="train")

pool = load("pool")
trainer = InfluenceTrainer(
    model="inputs/model",
    args=InfluenceConfig(
        output_dir=sys.argv[1], bf16=False, use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        learning_rate=3e-3, num_train_epochs=1, per_device_train_batch_size=8, activation_checkpointing=False, seed=0,
    ),
    train_dataset=pool,
    eval_dataset={"reverse": load("validation"), "copy": load("validation_copy")},
    processing_class=AutoTokenizer.from_pretrained("inputs/model"),
    peft_config=LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules="all-linear"),
)
trainer.train()
trainer.fit_influence().save_pretrained("scorer_named")
scored = trainer.score_influence()
mapped = pool.map(InfluenceScorer.from_pretrained("scorer_named"), batched=True)
columns = ["influence", "influence_reverse", "influence_copy", "num_loss_tokens"]
assert all(np.isfinite(mapped[name][:]).all() for name in columns)
for name in columns:
    print(f"{name}: trainer and scorer differ by", np.abs(np.subtract(scored[name][:], mapped[name][:])).max())
with open("scores_named.json", "w") as file:
    json.dump({name: mapped[name][:] for name in ["id", *columns]}, file, indent=1)
"""


def run_python(env: dict[str, str], *arguments: str) -> None:
    """Run the checkout's code in the output folder."""
    subprocess.run([sys.executable, *arguments], cwd=OUT, env=env, check=True)


def make_inputs() -> None:
    """Model, rows and settings, with paths relative to the output folder."""
    import recipe_runs
    import yaml

    (OUT / "inputs").mkdir()
    config = recipe_runs.make_inputs(OUT / "inputs")
    recipe_runs.write_rows(OUT / "inputs" / "validation_copy.jsonl", recipe_runs.make_rows("copy", 6, seed=5))
    config |= {
        "model_name_or_path": "inputs/model",
        "pool": "inputs/pool.jsonl",
        "validation": ["inputs/validation.jsonl"],
        "test": "inputs/test.jsonl",
        "output_dir": "run",
        "seeds": [0, 1],
    }
    (OUT / "inputs" / "settings.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")


def publish(home: Path) -> None:
    """Publish the run to a Hub of our own and write down what the repository then holds."""
    with LoopbackHub() as hub:
        hub.add_user(TOKEN, "ada")
        flags = ["--run", "run", "--hub_id", REPO_ID, "--random_controls"]
        run_python(make_env(hub, home, TOKEN) | CPU, str(ROOT / "recipes" / "publish.py"), *flags)
        check_that_tokens_stayed_secret(hub)
        repo = hub.repos[("dataset", REPO_ID)]
        assert len(repo.history()) == 2  # one commit beside the empty one
        for path, content in repo.files().items():
            (OUT / "published" / path).parent.mkdir(parents=True, exist_ok=True)
            (OUT / "published" / path).write_bytes(content)


def main() -> None:
    """Make everything, then drop what is large: pictures, pages, most arms' adapters, and the state of the passes."""
    if (OUT / "run").exists():
        raise SystemExit(f"{OUT} holds a run already. Give another folder.")
    OUT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        # Without recipes/, where evaluate.py would hide the library of that name.
        offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": f"{temporary}/offline", "PYTHONPATH": str(ROOT)}
        env = kept | offline | CPU
        run_python(env, "-c", f"import hf_in2core as h; assert h.__file__.startswith({str(ROOT)!r} + '/'), h.__file__")
        make_inputs()
        run_python(env, str(ROOT / "recipes" / "in2core.py"), "--config", "inputs/settings.yaml")
        run_python(env, "-c", SCORES)
        run_python(env, "-c", NAMED, f"{temporary}/named")
        publish(Path(temporary) / "online")
    for folder in (OUT / "run", OUT / "published"):
        for file in [*folder.rglob("*.png"), *folder.rglob("report.html")]:
            print(f"dropped: {file.relative_to(OUT)} ({file.stat().st_size:,} bytes)")
            file.unlink()
    shutil.rmtree(OUT / "published" / "plots")
    shutil.rmtree(OUT / "run" / "influence")  # which names the source it was made by and fits no other
    for folder in (OUT / "run" / "arms").iterdir():
        for file in folder.iterdir():
            if folder.name != "steps-full-1-0" and file.name != "result.json":
                file.unlink()


if __name__ == "__main__":
    main()
