"""Cards: valid front matter, nothing of the user's lost, and no text of the data that can do anything."""

import copy
import html
import json
import re
import subprocess
import sys
from dataclasses import asdict
from typing import Any

import pytest
import yaml
from datasets import Dataset, Features, Value
from datasets.info import DatasetInfosDict
from datasets.utils.metadata import MetadataConfigs
from helpers import ROOT, flatten, read_markdown
from huggingface_hub import DatasetCard, ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_in2core.cards.dataset import render_influence_section, summarise_influence
from hf_in2core.cards.metadata import (
    SplitFacts,
    inherit_metadata,
    join_card,
    merge_splits,
    parse_card,
    replace_section,
)
from hf_in2core.cards.model import render_target_model_card
from hf_in2core.cards.text import escape_markdown, format_block, format_code, load_template
from hf_in2core.selection.answers import compare_answers


EVIL = [
    "---\nlicense: mit\n---\n# Front matter",
    "{{ 7 * 7 }} {% for x in range(9) %}x{% endfor %} {# gone #}",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "[click](javascript:alert(1)) ![pixel](http://evil.example/x.png) <http://evil.example> www.evil.example",
    "```\n# out of the block\n```\n~~~\n````````",
    "null \x00 bell \x07 del \x7f bidi \u202e\u2066 tag \U000e0041 separator \u2028 surrogate \ud800",
    "<!-- in2core:end default -->\n# now outside\n<!-- in2core:begin default -->",
    "| a | b |\n|---|---|\n| c | d | $x^2$ @user #1 :smile: ~~gone~~ **bold** _it_ \\* &lt; &#60;",
]
FEATURES = Features({"text": Value("string"), "influence": Value("float64"), "num_loss_tokens": Value("int64")})
SCORER = {
    "base_model": "user/tiny",
    "base_model_revision": "abc123",
    "adapter_hash": "f00d",
    "estimator": "datainf",
    "damping_scale": 0.1,
    "influence_layers": None,
    "num_fit_examples": 1600,
    "validation_sets": {"gsm8k": 50},
    "libraries": {"torch": "2.13.0", "trl": "1.16.0"},
}
RESULTS: dict[str, Any] = {
    "arms": [
        {"arm": arm, "fraction": fraction, "seed": seed, "budget": "steps", "rows": rows, "loss_tokens": 10 * rows}
        | {"steps": 100, "seconds": 50.0, "test_loss": loss + 0.02 * seed, "test_perplexity": 2.0}
        for arm, fraction, rows, loss in [("full", 1.0, 1600, 3.354), ("coreset", 0.25, 400, 3.158)]
        for seed in (0, 1)
    ],
    "selection": {"seconds": 61.5, "reference_seconds": 60.25, "rows": 1600},
    "verdict": {
        "text": "At equal steps the coreset beat random rows.",
        "fraction": 0.25,
        "budget": "steps",
        "intervals": {
            "coreset_minus_random": {"mean": -0.199, "low": -0.25, "high": -0.148, "n": 2, "outcome": "better"},
            "coreset_minus_full": None,
        },
        "cost": {"break_even_runs": 3},
    },
    "data": {
        "pool": {"rows": 1600, "shared": {"validation": 2, "test": 3}},
        "test": {"rows": 200, "near_copies": {"rows": 1, "pairs": []}},
    },
}


def make_scored(texts: list[str]) -> Dataset:
    influence = [None if i == 2 else float(i) - len(texts) / 2 for i in range(len(texts))]
    columns = {"text": texts, "influence": influence, "num_loss_tokens": list(range(len(texts)))}
    return Dataset.from_dict(columns, features=FEATURES)


def render(**changes) -> str:
    arguments = {"features": FEATURES, "splits": {"train": 1600, "coreset_25": 400}, "scorer": SCORER}
    return render_influence_section("user/repo", **(arguments | {"results": RESULTS} | changes))


# Text


@pytest.mark.parametrize("text", EVIL)
def test_no_row_leaves_its_block(text) -> None:
    summary = summarise_influence(make_scored([text if "\ud800" not in text else text[:-1]] * 8))
    section = render(summary=summary)
    plain = render(summary=summarise_influence(make_scored(["harmless"] * 8)))
    tokens, expected = read_markdown(section), read_markdown(plain)
    # Not one heading, link, picture, comment, table or paragraph more or less than with harmless rows.
    assert [token.type for token in flatten(tokens)] == [token.type for token in flatten(expected)]
    blocks = [token.content for token in tokens if token.type == "html_block" and token.content.startswith("<pre>")]
    assert len(blocks) == 6
    assert text[:3].split()[0] in html.unescape(blocks[0])
    assert section.count("<!-- in2core:") == plain.count("<!-- in2core:") == 2


@settings(max_examples=100, deadline=None)
@given(st.text() | st.sampled_from(EVIL))
def test_any_text_is_one_block(data) -> None:
    text = f"before\n\n{format_block(data)}\n\nafter"
    assert [token.type for token in read_markdown(text)] == [
        *("paragraph_open", "inline", "paragraph_close"),
        "html_block",
        *("paragraph_open", "inline", "paragraph_close"),
    ]
    inside = format_block(data).removeprefix("<pre><code>").removesuffix("</code></pre>")
    assert not re.search(r"[<>`\x00-\x09\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", inside)
    assert html.unescape(inside).count("\n") == data.count("\n")
    text.encode()


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1) | st.sampled_from(EVIL))
def test_escaped_text_reads_as_itself_and_does_nothing(text) -> None:
    tokens = read_markdown(f"a {escape_markdown(text)} z")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert {token.type for token in tokens[1].children} <= {"text", "text_special"}
    shown = "".join(token.content for token in tokens[1].children)
    visible = "".join(character for character in text if character.isalnum() or character in "<>[]()*_`|$#")
    assert "".join(character for character in shown[1:-1] if character in visible) == visible


@pytest.mark.parametrize("name", ["plain", "a|b", "`x`", "x\ny", "<b>", "[a](b)", " ", "ünïcode", "a" * 300])
def test_a_column_name_stays_in_its_cell(name) -> None:
    table = f"| Column |\n|---|\n| {format_code(name)} |\n"
    cells = [token for token in read_markdown(table) if token.type == "td_open"]
    assert len(cells) == 1
    assert not any(token.type in ("link_open", "image") for token in flatten(read_markdown(table)))


def test_long_rows_are_shortened() -> None:
    row = {"text": "x" * 100_000, "messages": [{"role": "user", "content": "y" * 1000}] * 50, "blob": b"z" * 5000}
    many = {f"column {i}" * 50: "x" * 300 for i in range(100)}
    for columns in (row, many):
        scored = Dataset.from_list([columns | {"influence": -1.0}])
        [(_, text)] = summarise_influence(scored).extremes
        assert 1900 < len(text) < 2100 and text.endswith("\N{HORIZONTAL ELLIPSIS}</code></pre>")


def test_verdict_and_arm_names_are_escaped_too() -> None:
    arms = [RESULTS["arms"][0] | {"arm": "<img src=x>|[a](b)"}]
    section = render(results={"arms": arms, "verdict": {"text": "# {{ 7*7 }} <script>x</script>\n\n- list"}})
    types = {token.type for token in flatten(read_markdown(section))}
    assert "html_inline" not in types
    assert "<script>" not in section
    assert "49" not in section


def list_paths(value, path=()):
    """The path of every value in nested objects and lists."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from list_paths(item, (*path, key))


@pytest.mark.parametrize("wrong", [None, True, "<b>x</b>|", [["x"]], {"y": {"z": 1}}, 10**400, float("nan"), [{}]])
def test_results_of_wrong_types_are_shown_as_text_or_not_at_all(wrong) -> None:
    for path in list(list_paths(RESULTS))[1:]:
        results = copy.deepcopy(RESULTS)
        parent = results
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = wrong
        run = results["arms"][0] if isinstance(results["arms"], list) else None
        model_card = render_target_model_card(
            "m",
            base_model="user/tiny",
            dataset_id="user/repo",
            run=run if isinstance(run, dict) else {},
            results=results,
        )
        for text in (render(results=results), model_card):
            assert "<b>" not in text and "html_inline" not in {t.type for t in flatten(read_markdown(text))}


# What the card says


def test_the_section_states_sign_verdict_provenance_and_cost() -> None:
    section = render(summary=summarise_influence(make_scored([f"row {i}" for i in range(8)])))
    for stated in [
        "**Negative influence = proponent**",
        "> At equal steps the coreset beat random rows.",
        "| coreset \N{MINUS SIGN} random | 0.25, equal steps | -0.199 | -0.250 to -0.148 | 2 | lower loss |",
        "| coreset 0.25 | equal steps | 2 | 400 | 4,000 | 100 | 50.0 | 3.168 ± 0.127 | 2.00 ± 0.00 |",
        "± is half the 95 % Student-t interval over 2 seeds.",
        "`coreset_25` | 400 | 25.0 % |",
        "| Reference model | `user/tiny` |",
        "| Its revision | `abc123` |",
        "| Hash of the reference adapter | `f00d` |",
        "| Layers | `all` |",
        "`gsm8k` (50 rows)",
        "torch 2.13.0, trl 1.16.0",
        "Computing influence: 61.5 s",
        "Target runs until selecting has paid: 3",
        "arXiv:2408.03560",
        "arXiv:2310.00902",
    ]:
        assert stated in section, stated
    assert "coreset \N{MINUS SIGN} full" not in section  # that comparison was not run


def test_what_the_test_set_shares_is_said_and_what_is_not_known_is_not() -> None:
    section = html.unescape(render())
    assert "on the test set, which is not apart from what trained and selected: 3 of 1,600 rows of the pool" in section
    assert "1,600 rows, 2 of them in the validation set too, 3 of them in the test set too" in section
    assert "200 rows, 1 with a near-copy in the pool" in section
    # A run of a version that did not compare them.
    before = html.unescape(render(results={name: value for name, value in RESULTS.items() if name != "data"}))
    assert "per labelled token on the test set. " in before


def test_a_coreset_of_one_answer_is_told_of() -> None:
    answers = [*"ABCD"] * 10
    for kept, told in (([row for row in range(40) if answers[row] == "A"], True), (range(12), False)):
        found = asdict(compare_answers(answers, kept))
        section = " ".join(html.unescape(render(results=RESULTS | {"answers": found})).split())
        assert ("10 of its 10 rows answer `A` (of the pool's 40 rows 10 do)" in section) == told
        assert ("collapsed" in section) == told


def test_without_a_comparison_the_card_does_not_claim_one() -> None:
    section = render(results=None)
    assert "No comparison with random rows has been published" in section
    assert "beat random" not in section


def test_a_scoring_alone_says_so() -> None:
    told = "no coreset has been chosen from it"
    assert told in render(splits={"train": 1600}) and told not in render()


@pytest.mark.parametrize(
    "arm, said",
    [
        ("coreset", "Its rows are chosen in turn by 24 rows (negative influence = proponent"),
        ("full", "Its rows are all of the pool"),
        ("random", "Its rows are drawn at random"),
        ("opponents", "a control that should do worse"),
        ("bm25", "Its rows are chosen by BM25"),
        ("reference", "this model's gradients are what influence is computed from"),
        ("–", None),
    ],
)
def test_the_card_of_a_model_says_which_rows_it_had(arm: str, said: str | None) -> None:
    results = RESULTS | {"choice": {"how": "in turn by 24 rows"}}
    text = render_target_model_card(
        "m", base_model="user/tiny", dataset_id="user/pool", run={"arm": arm, "rows": 5}, results=results
    )
    text = html.unescape(text)
    assert "on 5 rows of [user/pool]" in text
    assert (said in text) if said is not None else ("Its rows are" not in text)
    # Which rows of the pool these were is not on the Hub.
    assert "load_dataset(" not in text


def test_the_card_of_a_model_has_its_command_and_no_sign_where_that_chose_nothing() -> None:
    results = RESULTS | {"choice": {"how": "by cosine_rank (validation rows in turn)"}}
    run = RESULTS["arms"][2]
    for entry, made in ((run, "By the command of the comparison"), (run | {"seed": 7}, "By this command")):
        text = html.unescape(
            render_target_model_card(
                "m",
                base_model="user/tiny",
                dataset_id="user/pool",
                run=entry,
                results=results,
                command="in2core run -x",
            )
        )
        assert "Its rows are chosen by cosine_rank (validation rows in turn).\n" in text.replace("&#95;", "_")
        assert made in text and "```bash\nin2core run -x\n```" in text
    assert "How it was made" not in render_target_model_card(
        "m", base_model="user/tiny", dataset_id="user/pool", run=run, results=results
    )


def test_summary_counts_rows_and_orders_extremes_by_sign() -> None:
    summary = summarise_influence(make_scored([f"row {i}" for i in range(8)]))  # influence -4 -3 null -1 0 1 2 3
    assert (summary.rows, summary.without_loss, summary.proponents) == ("8", "1", "3")
    titles = [title for title, _ in summary.extremes]
    assert titles[0] == "Proponent: row 0, rank 0, percentile 0.0, influence -4"
    assert titles[3] == "Opponent: row 7, rank 6, percentile 100.0, influence +3"
    assert summary.quantiles[0] == "-4" and summary.quantiles[-1] == "3"
    assert summary.length_correlation == "1.00"


def test_summary_of_a_pool_without_any_loss() -> None:
    nothing = Dataset.from_dict(
        {"influence": [None, float("nan")]}, features=Features({"influence": Value("float64")})
    )
    section = render(features=nothing.features, summary=summarise_influence(nothing))
    assert "2 carry no loss" in section


def test_target_model_card_has_results_that_the_hub_renders() -> None:
    run = RESULTS["arms"][2]
    text = render_target_model_card(
        "tiny-25",
        base_model="user/tiny",
        dataset_id="user/repo",
        split="coreset_25",
        dataset_revision="a" * 40,
        run=run,
        results=RESULTS,
        test_name="user/test",
    )
    card = ModelCard(text)
    assert card.data["base_model"] == "user/tiny"
    assert card.data["datasets"] == ["user/repo"]
    name, evaluated = model_index_to_eval_results(yaml.safe_load(text.split("---")[1])["model-index"])
    assert name == "tiny-25"
    assert {result.metric_type: result.metric_value for result in evaluated} == {"loss": 3.158, "perplexity": 2.0}
    # It was judged on the test set, not on the rows that it was trained on.
    assert {(result.dataset_type, result.dataset_name) for result in evaluated} == {("user/test", "user/test")}
    assert "split `coreset_25`" in text and f'revision="{"a" * 40}"' in text
    assert "| coreset 0.25 | 400 | 4,000 | 100 | 50.0 | 3.158 | 2.00 |" in text  # this model
    assert (
        "| coreset 0.25 | equal steps | 2 | 400 | 4,000 | 100 | 50.0 | 3.168 ± 0.127 | 2.00 ± 0.00 |" in text
    )  # the comparison
    assert "> At equal steps the coreset beat random rows." in text
    again = text.replace("# tiny-25", "# tiny-25\n\nWritten by hand.")
    assert "Written by hand." in render_target_model_card(
        "tiny-25", base_model="user/tiny", dataset_id="user/repo", run=run, results=RESULTS, existing=again
    )


def test_target_model_card_of_local_files_names_no_folder_and_claims_nothing() -> None:
    run = {"arm": "coreset", "rows": 5, "loss_tokens": 50, "steps": 2}
    text = render_target_model_card(
        "tiny", base_model="/home/ada/models/tiny", dataset_id="/home/ada/rows", run=run, results={}
    )
    assert "/home" not in text and "huggingface.co/" not in text
    assert "has not been judged" in text and "No comparison with random rows" in text
    assert "model-index" not in text and "base_model" not in ModelCard(text).data.to_dict()


# Front matter


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.from_regex(r"[a-z_]{1,12}", fullmatch=True).filter(
            lambda key: key not in ("ignore_metadata_errors", "self")
        ),
        st.recursive(
            st.text(
                st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"], exclude_characters="\u2028\u2029\ufeff")
            )
            | st.integers()
            | st.booleans()
            | st.sampled_from(["---", "a\n---\nb", "no", "on", "1e3", "2024-01-01", "{{ x }}", ": x", "- y", "# z"]),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.from_regex(r"[a-z]{1,5}", fullmatch=True), inner)
            ),
            max_leaves=6,
        ),
        max_size=5,
    ),
    st.text(max_size=50),
)
def test_front_matter_survives_any_value(data, body) -> None:
    text = join_card(data, body)
    assert parse_card(text) == (data, body)
    assert DatasetCard(text).text == body


def test_norwegian_is_not_false() -> None:
    data, body = parse_card("---\nlanguage: no\ngated: true\ntags: [yes, off]\n---\nbody")
    assert data == {"language": "no", "gated": True, "tags": ["yes", "off"]}
    assert yaml.safe_load(join_card(data, body).split("---")[1])["language"] == "no"


@pytest.mark.parametrize("text", ["---\n- a\n- b\n---\n", "---\na: [1\n---\n", "---\n1: x\n---\n"])
def test_a_card_that_cannot_be_kept_is_refused(text) -> None:
    with pytest.raises(ValueError, match="README.md"):
        parse_card(text)


def test_a_section_replaces_its_like_and_nothing_else() -> None:
    section = "<!-- in2core:begin default -->\nnew \\1 \\g<0>\n<!-- in2core:end default -->"
    old = section.replace("new", "old")
    other = old.replace("default", "math")
    body = f"\n# Mine\n\nabove\n{other}\n{old}\nbelow\n<!-- in2core:begin default -->\nunfinished, by hand\n"
    replaced = replace_section(body, "default", section)
    assert replaced == body.replace(old, section)
    assert replace_section(replaced, "default", section) == replaced
    assert replace_section("\n# Mine\n", "default", section) == f"# Mine\n\n{section}\n"


def read_with_datasets(data: dict):
    card = DatasetCard(join_card(data, "")).data
    return MetadataConfigs.from_dataset_card_data(card), DatasetInfosDict.from_dataset_card_data(card)


def test_splits_are_entered_beside_what_is_there() -> None:
    data: dict = {}
    facts = {"train": SplitFacts(100, 1000)}
    files = {"data/train-00000-of-00001.parquet": 300}
    assert merge_splits(data, "default", "data", FEATURES, facts, files) == {"train": 100}
    files |= {"data/coreset_50-00000-of-00001.parquet": 200}
    rows = merge_splits(data, "default", "data", FEATURES, {"coreset_50": SplitFacts(50, 500)}, files)
    assert rows == {"train": 100, "coreset_50": 50}
    files |= {"math/train-00000-of-00001.parquet": 70}
    merge_splits(data, "math", "math", Features({"x": Value("int64")}), {"train": SplitFacts(7, 70)}, files)
    configs, infos = read_with_datasets(data)
    assert list(configs) == ["default", "math"]
    assert infos["default"].splits["coreset_50"].num_examples == 50
    assert infos["default"].download_size == 500 and infos["default"].dataset_size == 1500
    assert infos["default"].features == FEATURES
    assert infos["math"].download_size == 70
    before = json.dumps(data)
    merge_splits(data, "math", "math", Features({"x": Value("int64")}), {"train": SplitFacts(7, 70)}, files)
    assert json.dumps(data) == before


def test_splits_without_a_configuration_are_named_so_that_they_still_load() -> None:
    data: dict = {"license": "mit"}
    files = {"data/test-00000-of-00001-0123456789abcdef.parquet": 10, "data/train-00000-of-00001.parquet": 20}
    merge_splits(data, "default", "data", FEATURES, {"train": SplitFacts(2, 20)}, files)
    configs, infos = read_with_datasets(data)
    assert [file["split"] for file in configs["default"]["data_files"]] == ["test", "train"]
    # How many rows `test` has is not known here: stating only those of `train` would make loading fail.
    assert infos["default"].splits is None


def test_other_columns_in_a_configuration_are_refused_before_anything_is_sent() -> None:
    data: dict = {}
    merge_splits(data, "default", "data", FEATURES, {"train": SplitFacts(1, 1), "coreset_25": SplitFacts(1, 1)}, {})
    wider = Features(dict(FEATURES) | {"influence_gsm8k": Value("float64")})
    with pytest.raises(ValueError, match="coreset_25.*influence_gsm8k.*config_name"):
        merge_splits(data, "default", "data", wider, {"train": SplitFacts(1, 1)}, {})
    merge_splits(data, "default", "data", wider, {"train": SplitFacts(1, 1), "coreset_25": SplitFacts(1, 1)}, {})


def test_metadata_is_inherited_where_the_card_has_none() -> None:
    data: dict = {"language": ["de"]}
    inherit_metadata(data, {"a/b": {"language": "en", "license": "mit", "task_categories": ["text-generation"]}})
    assert data == {
        "language": ["de"],
        "source_datasets": ["a/b"],
        "license": "mit",
        "task_categories": ["text-generation"],
    }
    data = {}
    inherit_metadata(data, {"a/b": {"license": "mit"}, "c/d": {"language": ["no", "en"]}})
    assert "license" not in data, "rows of c/d would get a licence that nobody gave them"
    assert data["language"] == ["no", "en"]
    data = {}
    inherit_metadata(data, {"a/b": {"license": "mit"}, "c/d": {"license": ["cc-by-4.0"]}})
    assert data["license"] == ["mit", "cc-by-4.0"]


# Where templates come from


def test_templates_come_from_the_package_when_it_has_them(tmp_path) -> None:
    for name in ("influence_dataset.md", "target_model.md"):
        assert load_template(name) == (ROOT / "dataset_cards" / name).read_text(encoding="utf-8")
    with pytest.raises(FileNotFoundError, match=r"no_such\.md"):
        load_template("no_such.md")


@pytest.mark.slow
def test_a_card_renders_from_an_installed_wheel(tmp_path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    wheel = next(tmp_path.glob("*.whl"))
    target = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    code = (
        "import hf_in2core.cards.text as c; from datasets import Features, Value\n"
        "from hf_in2core.cards.dataset import render_influence_section as r\n"
        f"assert c.__file__.startswith({str(target)!r}), c.__file__\n"
        "from hf_in2core.report.page import load_asset\n"
        "assert all(load_asset(f'page.{suffix}') for suffix in ('html', 'css', 'js'))\n"
        "print(r('user/repo', features=Features({'influence': Value('float64')}), splits={'train': 2}))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], env={"PYTHONPATH": str(target)}, cwd=tmp_path, capture_output=True
    )
    assert run.returncode == 0, run.stderr.decode()
    assert "Negative influence = proponent" in run.stdout.decode()
