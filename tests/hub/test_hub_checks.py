"""What cannot work is refused before anything is sent, and before the work that a push would end.

The real clients talk to the Hub of `loopback_hub.py` from processes of their own.
"""

import json

import pytest
from hub_client import PUSH, TOKEN, ClientError, get_repo


# Refused before anything is sent


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("coresets={'train': make_pool()}", "cannot be called 'train'"),
        ("coresets={'a/b': make_pool()}", "'a/b' cannot name a split"),
        ("coresets={'coreset_50': make_pool().select([])}", "'coreset_50' has no rows"),
        ("coresets={'c': make_pool().remove_columns('prompt')}", "differ in the columns prompt"),
        ("coresets={'c': make_pool().cast_column('num_loss_tokens', Value('float32'))}", "different columns"),
        ("config_name='data'", "'data' cannot name a configuration"),
        ("scorer='.'", "no scorer's folder"),
        ("report='nowhere'", "is not a folder"),
        ("private=True", "is public"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(hub, client, change, expected) -> None:
    if ("dataset", "ada/refused") not in hub.repos:
        hub.add_repo("dataset", "ada/refused")
    with pytest.raises(ClientError) as raised:
        client.run(f"from datasets import Value\npush('ada/refused', make_pool(), {change})")
    assert raised.value.kinds[0] == "ValueError" and expected in raised.value.message
    assert len(get_repo(hub, "ada/refused").history()) == 1
    assert not get_repo(hub, "ada/refused").objects


def test_unscored_and_streamed_pools_are_refused(client) -> None:
    for code, expected in [
        ("make_pool().remove_columns('influence')", "has no column 'influence'"),
        ("make_pool().to_iterable_dataset()", "has to be a datasets.Dataset"),
    ]:
        with pytest.raises(ClientError) as raised:
            client.run(f"push('ada/refused', {code})")
        assert expected in raised.value.message


def test_other_columns_beside_a_published_split_are_refused(hub, client) -> None:
    client.run(PUSH, repo_id="ada/columns")
    before = len(hub.requests(kind="upload"))
    with pytest.raises(ClientError) as raised:
        client.run("push('ada/columns', make_pool().add_column('influence_gsm8k', [0.0] * 60))")
    assert "coreset_50" in raised.value.message and "influence_gsm8k" in raised.value.message
    assert len(get_repo(hub, "ada/columns").history()) == 2
    assert len(hub.requests(kind="upload")) == before


@pytest.mark.parametrize("where", ["config.yaml", "results.json", "scorer/config.json", "scorer/tokenizer.model"])
def test_a_token_in_a_file_is_never_published(hub, client, tmp_path, where) -> None:
    (tmp_path / "scorer").mkdir()
    (tmp_path / "scorer" / "config.json").write_text("{}")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    somebody_elses = "hf_" + "Z9" * 17
    # In a file that is no text nobody else's token is looked for, but the one in use is.
    for token in (TOKEN, somebody_elses)[: 1 if where.endswith(".model") else 2]:
        (tmp_path / where).write_text(json.dumps({"hub_token": token}))
        with pytest.raises(ClientError) as raised:
            client.run("push('ada/secret', make_pool(), scorer=run + '/scorer', report=run)", run=str(tmp_path))
        assert raised.value.kinds[0] == "ValueError" and "access token" in raised.value.message
        assert token not in raised.value.message
    assert ("dataset", "ada/secret") not in hub.repos


NAMES = [
    ("a/b", False),
    ("a:b", False),
    ("..", False),
    ("a..b", False),
    ("a b", False),
    ("a-b", False),
    ("ünïcode", False),
    ("all", False),
    ("a\n", False),
    ("", False),
    ("x" * 200, False),
    ("x" * 100, True),
    ("coreset_12.5", True),
    ("a=b", False),
    ("CON.1_x", True),
]


def test_names_that_pass_the_check_load_and_others_are_refused(hub, client) -> None:
    found = client.run(
        """
        from datasets import load_dataset
        from hf_in2core.hub.checks import check_names
        result = []
        for name, _ in names:
            try:
                check_names([name])
                result.append(True)
            except ValueError:
                result.append(False)
        good = [name for name, _ in names if check_names([]) is None and result[[n for n, _ in names].index(name)]]
        pool = make_pool()
        push("ada/" + "n" * 90, pool, coresets={name: pool.select(range(3)) for name in good})
        loaded = load_dataset("ada/" + "n" * 90)
        assert set(loaded) == {"train", *good}, loaded
        push("ada/names", pool, config_name="a=b.c-d_" + "x" * 90)
        assert load_dataset("ada/names", "a=b.c-d_" + "x" * 90, split="train").num_rows == 60
        """,
        names=NAMES,
    )
    assert found == [expected for _, expected in NAMES]
    for config in ("a/b", "a:b", "..", ".hidden", "a b", "ünïcode", "data", "", "x" * 200):
        with pytest.raises(ClientError):
            client.run("check_names(['train'], name)", name=config)


# check_can_push


def test_check_can_push_says_what_a_push_would_meet(hub, client) -> None:
    hub.add_repo("dataset", "ada/held", {"data/train-0.parquet": b"x", "scorer/config.json": b"{}", "own.txt": b"y"})
    hub.add_repo("model", "ada/amodel")
    hub.add_repo("dataset", "ada/licensed", {"README.md": b"---\nlicense: mit\n---\n"})
    hub.add_repo("dataset", "ada/closed", private=True)
    requests = len(hub.log)
    found = client.run(
        """
        from hf_in2core.hub.checks import check_can_push
        shown = lambda c: [c.head is not None, list(c.overwrites), list(c.warnings)]
        result = [
            shown(check_can_push("ada/held", splits=["train", "new"])),
            shown(check_can_push("fresh")),
            shown(check_can_push("ada/amodel")),
            shown(check_can_push("ada/held", source_datasets=["ada/licensed", "ada/held", "no/where"])),
            shown(check_can_push("ada/closed", private=False)),
            shown(check_can_push("ada/held", revision="not-yet")),
        ]
        """
    )
    assert found[0] == [True, ["data/train-0.parquet"], []]
    assert found[1] == [False, [], []]
    assert "is a model today" in found[2][2][0]
    # `ada/licensed` states one.
    assert [warning.split(" states no licence")[0] for warning in found[3][2]] == ["ada/held", "no/where"]
    assert "stays so" in found[4][2][0]
    assert found[5][:2] == [False, []]
    assert {request.method for request in hub.log[requests:]} == {"GET"}  # it wrote nothing


@pytest.mark.parametrize(
    ("token", "repo_id", "options", "kind", "expected"),
    [
        ("hf_" + "R" * 34, "rita/x", {}, "PermissionError", "may only read"),
        ("hf_" + "X" * 34, "ada/x", {}, "PermissionError", "does not accept the access token"),
        (None, "ada/one", {}, "PermissionError", "No access token"),
        ("hf_" + "B" * 34, "ada/held", {}, "PermissionError", "may not write to the dataset ada/held"),
        ("hf_" + "B" * 34, "ada/nothing", {}, "PermissionError", "bob cannot create"),
        ("hf_" + "B" * 34, "ada/gated", {"create_pr": True}, "PermissionError", "may not read the dataset ada/gated"),
        ("hf_" + "F" * 34, "fay/new", {}, "PermissionError", "fine-grained token may not write"),
        (TOKEN, "ada/held", {"private": True}, "ValueError", "is public"),
        (TOKEN, "ada/held", {"revision": "a" * 40}, "ValueError", "is a commit"),
        (TOKEN, "ada/held", {"repo_type": "space"}, "ValueError", "Use 'dataset' or 'model'"),
        (TOKEN, "ada/held", {"splits": ["a b"]}, "ValueError", "cannot name a split"),
        (TOKEN, "a/b/c", {}, "HFValidationError", "a/b/c"),
        (TOKEN, "", {}, "ValueError", "is no repository"),
    ],
)
def test_check_can_push_refuses(hub, client, tmp_path, token, repo_id, options, kind, expected) -> None:
    for name, fields in (("ada/held", {}), ("ada/gated", {"gated": True})):
        if ("dataset", name) not in hub.repos:
            hub.add_repo("dataset", name, **fields)
    hub.add_user("hf_" + "F" * 34, "fay", role="fineGrained")
    code = """
    import os
    from hf_in2core.hub.checks import check_can_push
    kept = os.environ.pop("HF_TOKEN") if token is None else None
    try:
        check_can_push(repo_id, token=token, **options)
    finally:
        if kept:
            os.environ["HF_TOKEN"] = kept
    """
    with pytest.raises(ClientError) as raised:
        client.run(code, token=token, repo_id=repo_id, options=options)
    assert raised.value.kinds[0] == kind
    assert expected in raised.value.message
    assert token is None or token not in raised.value.message
