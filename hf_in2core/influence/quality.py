"""What a fit is worth, measured beside it: agreement with the exact inverse, and of halves of the validation sets."""

import logging
import math

from datasets import Dataset

from hf_in2core.engine.curvature import CURVATURE_ROWS, MIN_CURVATURE_ROWS, measure_curvature, take_curvature_sample
from hf_in2core.engine.fit_sums import FitResult, GradientSample
from hf_in2core.engine.halves import MIN_QUERIES, measure_halves, say_disagreement
from hf_in2core.engine.passes import Passes
from hf_in2core.names import describe_set

from .config import InfluenceConfig


logger = logging.getLogger(__name__)

# Of the pool, the share of rows that may be passed for these checks alone, where the fit has not kept them.
MAX_CHECKED_SHARE = 0.01


def count_checked_rows(num_rows: int, set_sizes: list[int], is_kept: bool) -> int:
    """Rows that every process passes to compare halves: of the sets, and of a pool whose gradients were not kept."""
    pool = 0 if is_kept else min(int(MAX_CHECKED_SHARE * num_rows), CURVATURE_ROWS)
    if not is_kept and pool < MIN_CURVATURE_ROWS:
        return 0
    return pool + sum(min(size, CURVATURE_ROWS) for size in set_sizes if size >= MIN_QUERIES)


def measure_fit(
    passes: Passes,
    pool: Dataset,
    validation: dict[str, Dataset],
    result: FitResult,
    args: InfluenceConfig,
    sample: GradientSample | None,
    per_example: bool,
) -> None:
    """
    Fill in `exact_agreement` and `validation_agreement` of a fit and what rounding did to its index; warn where halves
    of a validation set rank the pool differently. All processes have to call.

    Halves are not measured where every validation row is a query: `measure_agreement` reads them off the scored pool,
    all rows of it, and such rows may choose in turn. Nor are they for cosines, which are no sums over rows.
    """
    if passes.store is not None and passes.store.kept and (told := passes.store.read_error()) is not None:
        result.store_error, result.store_agreement = told
    datainf = args.estimator == "datainf"
    halves = not per_example and args.estimator != "gradient_cosine"
    if not datainf and not halves:
        return
    most = int(MAX_CHECKED_SHARE * len(pool))
    gradients = take_curvature_sample(passes, pool, args.seed, sample if datainf else None, most)
    if gradients is None and passes.rank == 0 and sample is not None:
        logger.info(
            "Not measured: how far halves of a validation set agree%s. No gradients were kept, and a pass for them "
            "alone would have more than %d rows, a hundredth of the pool.",
            ", and how far DataInf is from the exact inverse" if datainf else "",
            most,
        )
    if datainf:
        agreement = measure_curvature(passes, pool, result, args.damping_scale, args.seed, gradients)
        result.exact_agreement = None if math.isnan(agreement) else agreement
    if halves:
        result.validation_agreement = measure_halves(passes, gradients, validation, result.damping, args.seed)
    for name, agreement in result.validation_agreement.items() if passes.rank == 0 else ():
        if (message := say_disagreement(agreement, f"{describe_set(name)} set")) is not None:
            logger.warning(message)
