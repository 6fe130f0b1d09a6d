"""Make a folder of lm-eval tasks from MMLU's csv files, for machines without the Hub.

    python recipes/mmlu/make_tasks.py --data path/to/mmlu --output_dir runs/mmlu_tasks
    accelerate launch recipes/evaluate.py --run RUN --tasks mmlu --include_path runs/mmlu_tasks --num_fewshot 5

`data` holds `test/<subject>_test.csv` and `dev/<subject>_dev.csv` (the examples), either as the authors publish them
(no header; question, four choices, letter) or with the header `question,choice0,choice1,choice2,choice3,answer`.
Prompt and metric are those of lm-eval's own `mmlu`; `mmlu` weighs every question alike. The tasks name their data by
absolute paths: make them again where the folder moves.
"""

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

import yaml


LETTERS = "ABCD"
PROMPT = "{{question.strip()}}\n" + "".join(f"{c}. {{{{choices[{i}]}}}}\n" for i, c in enumerate(LETTERS)) + "Answer:"
METRIC = {"metric": "acc", "aggregation": "mean", "higher_is_better": True}


def read_questions(path: Path) -> list[dict[str, Any]]:
    """
    Read the questions of a csv file.

    Raises:
        ValueError: naming the file and line that is no question.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = list(csv.reader(file))
    has_header = bool(lines) and [cell.strip().lower() for cell in lines[0]][:1] == ["question"]
    questions = []
    for number, line in enumerate(lines[has_header:], start=1 + has_header):
        if not line:
            continue
        answer = line[-1].strip()
        position = LETTERS.index(answer) if answer in tuple(LETTERS) else int(answer) if answer.isdigit() else -1
        if len(line) != 6 or position not in range(len(LETTERS)):
            raise ValueError(
                f"{path}, question {number}: a line is a question, four choices and the answer (A to D, or 0 to 3), "
                f"but this one has {len(line)} cells and the answer {answer!r}."
            )
        questions.append({"question": line[0], "choices": line[1:5], "answer": position})
    if not questions:
        raise ValueError(f"{path} holds no question.")
    return questions


def write_tasks(data: Path, folder: Path) -> list[str]:
    """
    Write one task for each subject that has test questions, and the group `mmlu` of them.

    Returns:
        `list[str]`: the subjects.

    Raises:
        ValueError: there are no test questions, or a subject has no examples.
    """
    paths = sorted((data / "test").glob("*_test.csv"))
    if not paths:
        raise ValueError(f"{data} holds no test/*_test.csv. Give the folder of MMLU's csv files.")
    subjects = [path.name.removesuffix("_test.csv") for path in paths]
    folder.mkdir(parents=True, exist_ok=True)
    for subject in subjects:
        examples = data / "dev" / f"{subject}_dev.csv"
        if not examples.is_file():
            raise ValueError(f"{examples} is missing: the examples of {subject}.")
        files = {}
        for split, path in (("test", data / "test" / f"{subject}_test.csv"), ("dev", examples)):
            lines = [json.dumps(question, ensure_ascii=False) + "\n" for question in read_questions(path)]
            files[split] = folder.resolve() / f"{subject}_{split}.jsonl"
            files[split].write_text("".join(lines), encoding="utf-8")
        task = {
            "task": f"mmlu_{subject}",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in files.items()}},
            "test_split": "test",
            "fewshot_split": "dev",
            "fewshot_config": {"sampler": "first_n"},
            "output_type": "multiple_choice",
            "description": "The following are multiple choice questions (with answers) about "
            f"{subject.replace('_', ' ')}.\n\n",
            "doc_to_text": PROMPT,
            "doc_to_choice": list(LETTERS),
            "doc_to_target": "answer",
            "metric_list": [METRIC],
            "metadata": {"version": 1.0},
        }
        write_yaml(folder / f"mmlu_{subject}.yaml", task)
    group = {
        "group": "mmlu",
        "task": [f"mmlu_{subject}" for subject in subjects],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}],
        "metadata": {"version": 2},
    }
    write_yaml(folder / "mmlu.yaml", group)
    return subjects


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write a task file."""
    path.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of MMLU's csv files, with dev/ and test/")
    parser.add_argument("--output_dir", required=True, help="folder of the tasks")
    options = parser.parse_args()
    try:
        subjects = write_tasks(Path(options.data), Path(options.output_dir))
    except (ValueError, OSError) as error:
        print(f"make_tasks.py: error: {error}", file=sys.stderr)
        return 1
    print(f"{len(subjects)} subjects: {', '.join(subjects)}")
    print(f"--tasks mmlu --include_path {options.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
