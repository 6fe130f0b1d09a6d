"""In2Core end to end: train a reference, score a pool by influence, fine-tune targets on the coreset, compare.

    in2core run --config my_run.yaml

The run folder gets config.yaml, reference/ (adapter), scorer/, scored/ (the annotated pool), coresets/, arms/,
results.json, three pictures and report.html. The same command into the same folder resumes. Negative influence =
proponent.
"""

import gc
import time
from typing import Any

from hf_in2core.names import AUTO, NUM_LOSS_TOKENS, POOL, name_coreset
from hf_in2core.pipeline.arguments import In2CoreArguments, describe_command
from hf_in2core.pipeline.parser import Settings, make_run_parser


PARSER = make_run_parser(__doc__)


def main(settings: Settings) -> None:
    """Run the pipeline; everything that is finished already is taken as it is."""
    begun = time.perf_counter()
    # Imported here, so that `--help` and a wrong flag are answered without them.
    from hf_in2core.pipeline.analyses import analyse_run
    from hf_in2core.pipeline.arm_folders import write_cards
    from hf_in2core.pipeline.columns import add_method_columns
    from hf_in2core.pipeline.comparison import (
        build_results,
        choose_coresets,
        compute_aucs,
        describe_selection,
        plan_arms,
        write_results,
    )
    from hf_in2core.pipeline.coreset_folders import write_coresets
    from hf_in2core.pipeline.job import check
    from hf_in2core.pipeline.methods import list_columns
    from hf_in2core.pipeline.next_steps import say_next
    from hf_in2core.pipeline.planning import plan_run
    from hf_in2core.pipeline.run_folder import join_processes, leaving_nothing, run_setup_script, warn
    from hf_in2core.pipeline.steps import (
        compute_reference_losses,
        evaluate_base,
        find_answers,
        publish,
        score_pool,
        train_arm,
        train_arms,
        train_reference,
    )
    from hf_in2core.pipeline.tournament import hold_tournament
    from hf_in2core.rows.scored import read_scores

    # What is imported stays; to look through it anew takes half a second for every arm.
    gc.freeze()
    args: In2CoreArguments = settings.arguments
    join_processes(settings)
    if args.setup_script is not None:
        started = time.perf_counter()
        run_setup_script(args.setup_script)
        begun += time.perf_counter() - started  # what it makes is there for the run that is planned
    job = check(settings)
    if args.dry_run:
        with leaving_nothing(job.folder):
            plan_run(job, begun)
        return

    # The reference model tells which rows of the pool lower the validation loss.
    adapter, reference = train_reference(job)
    tournament = hold_tournament(job, adapter, reference) if args.strategy == AUTO else None
    strategy = tournament["winner"] if tournament else args.strategy
    methods = args.list_methods(strategy)
    selection = score_pool(job, adapter, reference, methods, job.folder)
    scored, selection["columns"] = add_method_columns(job, adapter, methods, job.folder)
    # What the coreset is ranked by is a part of what selecting costs, and so is a tournament.
    selection["ranking_seconds"] = sum(selection["columns"][column] for column in list_columns([strategy]))
    if tournament is not None:
        spent = tournament["seconds"] + tournament["scoring_seconds"]
        selection |= {"tournament": tournament["text"], "tournament_seconds": spent}
    coresets = choose_coresets(args, job.folder, scored, strategy)
    # A fraction of 1 leaves nothing out: its rows are those of scored/.
    below = [name_coreset(fraction) for fraction in args.fractions if fraction < 1]
    write_coresets(job.folder, scored, {name: coresets[name] for name in below})
    named = [name for name in scored.column_names if name in ("id", args.task_column, args.wrong_column)]
    job.inputs.facts[POOL]["loss_tokens"] = int(read_scores(scored, NUM_LOSS_TOKENS).sum())
    sets = {name: len(rows) for name, rows in job.inputs.validation.items()}
    deciding, headline, findings = describe_selection(
        scored,
        job.inputs.pool,
        args.columns,
        job.reference_tokenizer,
        named,
        args.fractions,
        coresets,
        sets,
        selection,
    )
    findings["data"] = job.inputs.facts
    if tournament is not None:
        findings["tournament"] = tournament
    if headline is not None:
        findings["answers"] = find_answers(job, headline)
        if findings["answers"]["warning"] is not None:
            warn(findings["answers"]["warning"])
    if args.task_column is not None or args.wrong_column is not None:
        losses = compute_reference_losses(job, adapter)
        findings |= compute_aucs(scored, deciding, losses, job.inputs.validation, args.task_column, args.wrong_column)
    findings |= analyse_run(job, adapter, reference)

    # The targets: the same training on the rows of each arm, judged on the test set.
    plan = plan_arms(args)
    base = evaluate_base(job, max((coresets[arm.rows].positions for arm in plan), key=len))

    def write(arms: list[dict[str, Any]]) -> dict[str, Any]:
        results = build_results(
            settings.values, arms, len(plan), base, selection, findings, args.fractions, describe_command()
        )
        write_results(job.folder, results, scored, deciding, headline)
        return results

    results = train_arms(plan, lambda arm: train_arm(job, arm, coresets[arm.rows].positions, base["steps"]), write)
    write_cards(job, results, reference)
    if args.hub_id is not None:
        publish(job, scored, coresets)
    say_next(job, results, scored, coresets)
