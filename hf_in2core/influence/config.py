"""[`InfluenceConfig`]: TRL's SFT configuration plus the influence fields."""

from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig

from hf_in2core.names import LOSS_REDUCTIONS
from hf_in2core.rows.columns import check_columns


ESTIMATORS = ["datainf", "gradient_dot", "gradient_cosine"]
AUTOCAST_DTYPES = {"no": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_autocast(args: SFTConfig, dtype: torch.dtype) -> str:
    """
    Mixed precision of a run's forwards, training and influence and evaluation alike: a key of `AUTOCAST_DTYPES`.

    Args:
        args ([`~trl.SFTConfig`]):
            `bf16` and `fp16`.
        dtype (`torch.dtype`):
            Precision of the model's weights; those of float64 are never cast.
    """
    mixed = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
    return "no" if dtype == torch.float64 else mixed


@dataclass
class InfluenceConfig(SFTConfig):
    r"""
    Configuration class for the [`InfluenceTrainer`].

    All parameters of [`~trl.SFTConfig`] apply to the SFT of the reference model; these come on top:

    Parameters:
        > Parameters that control the influence

        damping_scale (`float`, *optional*, defaults to `0.1`):
            Damping of each block relative to its mean squared gradient norm per element (DataInf, section 4).
        loss_reduction (`str`, *optional*, defaults to `"mean"`):
            Per-example loss of training and validation rows alike, from the losses of their labelled tokens: the
            `"mean"` (as In2Core), the `"sum"`, `"sqrt"` (their sum divided by the square root of their number) or
            `"max"` (the hardest token alone, the first of equally hard ones). `"sum"` lets long rows count for more.
            With `"max"` rounding decides between tokens whose losses differ by no more than it, so that scores in
            half precision depend on the batch.
        estimator (`str`, *optional*, defaults to `"datainf"`):
            `"datainf"`, `"gradient_dot"` (DataInf with an identity inverse) or `"gradient_cosine"` (cosine between the
            whole concatenated gradients of the row and of the mean validation loss, negated). Negative = proponent in
            each of them.
        influence_layers (`str` or `list[int]`, *optional*):
            Decoder layers whose adapter tensors count: all by default, `"last:8"`, `"first:8"` or a list of indices.
        columns (`list[str]` or `str`, *optional*):
            How raw columns become TRL's: `["alpaca"]`, `["sharegpt"]`, `["openai"]` or `["prompt=instruction",
            "completion=output"]`; after a preset, pairs rename what it reads. A string is cut at its spaces. Saved
            with the scorer.

        > Parameters that control the passes

        tokens_per_batch (`int`, *optional*):
            Tokens of a batch in the influence and evaluation passes, padding included. By default what the caches of a
            CPU hold (2,048), and on a GPU what its free memory holds, measured on two rows (8,192 where no gradient
            is taken). Halved when memory runs out.
        influence_activation_checkpointing (`bool`, *optional*, defaults to `False`):
            Whether the influence passes keep the inputs of layers only and run each layer again in the backward: one
            more forward (a third to half of the time on top), for the memory of one layer instead of all. It changes
            no score. The passes do not follow `activation_checkpointing`, which is for SFT and on by default in TRL,
            because a smaller `tokens_per_batch` saves memory at no such price. Without it, only rows that do not fit
            in memory alone, and then those more than half as long, run so.
        fit_examples (`int` or `str`, *optional*, defaults to `"auto"`):
            Training rows in the fit pass. `"auto"`: a seeded sample that grows until the scores by its two halves
            agree (Spearman of 0.998 on rows outside of it, on every validation set; told with the result), all rows
            where they do not, and in a pool of fewer than 1,000 rows or with a gradient store. A number: a seeded
            sample of so many. `None` (`all` on the command line): all rows, the exact DataInf.
        chunk_size (`int`, *optional*, defaults to `1024`):
            Rows per resumable chunk. An interruption loses a chunk of scores at most; of a fit, whose sums can take
            long to write, a chunk or ten times as long as writing them takes.
        query_memory_gb (`float`, *optional*):
            Memory in GB (10^9 bytes) for the gradients of queries when every validation row is one (`fit_influence(
            per_example=True)`); queries that do not fit together take passes of their own. `None`: a quarter of what
            is free on a GPU (the fullest of several) or to the processes of a CPU together, there 4 at most.
        gradient_store_gb (`float`, *optional*, defaults to `0`):
            Disk budget in GB (10^9 bytes) for keeping the per-example gradients of the fit pass (`estimator="datainf"`
            on the whole pool, so not with a number as `fit_examples`). Where rows x adapter parameters fit in float32
            they are kept so, else in bfloat16 (scores then differ by its rounding), else not at all, with a warning.
            The score pass, and the fit passes of further blocks of queries, read them instead of running the model.
            They lie beside the other state under `output_dir` and are removed when `score_influence` is done. 0 stores
            nothing.
        gradient_store_dir (`str`, *optional*):
            Folder in which the gradients are kept as an index, for any estimator and for any number of rows to fit. It
            is filled once for a pool and an adapter, and every later run with both, whatever its validation sets,
            estimator or damping, fits and scores from it: no row of the pool passes the model but four in checks.
            Within `gradient_store_gb` in float32, else in bfloat16, else in 8 bits (`store_error` and
            `store_agreement` of the scorer say what that did); an error where not even those fit. Nothing in the
            folder is ever removed; each adapter of `score_influence(checkpoints=...)` has an index of its own.

    > [!NOTE]
    > A negative influence marks a proponent (training on the row lowers the validation loss), a positive one an
    > opponent; no option changes the sign.

    Raises:
        ValueError: if a value is out of its range, naming the field and the allowed values.
    """

    damping_scale: float = field(
        default=0.1, metadata={"help": "Damping of each block relative to its mean squared gradient norm per element."}
    )
    loss_reduction: str = field(
        default="mean",
        metadata={
            "help": "Per-example loss from its labelled tokens: their mean, their sum, the sum divided by the square "
            "root of their number (`sqrt`), or the hardest token alone (`max`).",
            "choices": list(LOSS_REDUCTIONS),
        },
    )
    estimator: str = field(default="datainf", metadata={"help": "How influence is estimated.", "choices": ESTIMATORS})
    influence_layers: list[str] | None = field(
        default=None,
        metadata={"help": "Decoder layers that count: `last:8`, `first:8` or indices. All by default."},
    )
    columns: list[str] | None = field(
        default=None,
        metadata={"help": "`alpaca`, `sharegpt`, `openai`, or pairs such as `prompt=instruction completion=output`."},
    )
    tokens_per_batch: int | None = field(
        default=None,
        metadata={"help": "Tokens of a batch in the influence passes, padding included. By default what fits."},
    )
    influence_activation_checkpointing: bool = field(
        default=False,
        metadata={"help": "Activation checkpointing in the influence passes: less memory, one more forward."},
    )
    fit_examples: int | str | None = field(
        default="auto",
        metadata={
            "help": "Training rows in the fit pass: `auto` (a sample that grows until its halves agree), a number or "
            "`all`."
        },
    )
    chunk_size: int = field(default=1024, metadata={"help": "Rows per resumable chunk of the influence passes."})
    query_memory_gb: float | None = field(
        default=None,
        metadata={
            "help": "Memory (GB) for queries' gradients when every validation row is a query. By default a quarter of "
            "what is free on a GPU, 4 on a CPU."
        },
    )
    gradient_store_gb: float = field(
        default=0.0, metadata={"help": "Disk budget (GB) for keeping the gradients of the fit pass. 0 stores nothing."}
    )
    gradient_store_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder that keeps the gradients, within `gradient_store_gb`, for later validation sets: they are "
            "fitted and scored without passing the pool again."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.fit_examples = parse_fit_examples(self.fit_examples)
        for name, allowed in (("estimator", ESTIMATORS), ("loss_reduction", list(LOSS_REDUCTIONS))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}={getattr(self, name)!r}` is unknown. Choose one of {', '.join(allowed)}.")
        if self.damping_scale <= 0:
            raise ValueError(
                f"`damping_scale={self.damping_scale}` would divide by zero. Give a positive value; DataInf uses 0.1."
            )
        for name in ("tokens_per_batch", "chunk_size", "fit_examples", "per_device_train_batch_size", "max_length"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"`{name}={value}` leaves no row to work on. Give at least 1.")
        if self.query_memory_gb is not None and self.query_memory_gb <= 0:
            raise ValueError(f"`query_memory_gb={self.query_memory_gb}` holds no query. Give a positive value.")
        if self.gradient_store_gb < 0:
            raise ValueError(f"`gradient_store_gb={self.gradient_store_gb}` is negative. Give 0 to store nothing.")
        if self.gradient_store_dir is not None and self.gradient_store_gb == 0:
            raise ValueError(
                f"`gradient_store_dir={self.gradient_store_dir!r}` is to keep gradients, for which "
                "`gradient_store_gb=0` leaves no room. Give the GB that they may take, or leave out the folder."
            )
        if self.gradient_store_gb > 0 and self.estimator != "datainf" and self.gradient_store_dir is None:
            raise ValueError(
                f"`gradient_store_gb={self.gradient_store_gb}` keeps the gradients of the fit pass, which "
                f"`estimator={self.estimator!r}` does not have. Leave it at 0, use `estimator='datainf'`, or give a "
                "`gradient_store_dir`, which keeps them for later runs."
            )
        if self.hub_token is not None:
            raise ValueError(
                "`hub_token` would be written in plain text into `training_args.bin`. Set the environment variable "
                "HF_TOKEN instead."
            )
        given: Any = self.columns
        self.columns = given.split() if isinstance(given, str) else given
        check_columns(self.columns)
        self.influence_layers = parse_influence_layers(self.influence_layers)  # type: ignore[assignment]


def parse_fit_examples(value: int | str | None) -> int | str | None:
    """
    Read `fit_examples` from Python or from the command line.

    Returns:
        `"auto"`, a number, or `None` for all rows.

    Raises:
        ValueError: if it is none of these.
    """
    if value is None or value == "auto" or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    text = str(value).strip().lower()
    if text in ("all", "none"):
        return None
    if text.lstrip("-").isdigit():
        return int(text)
    raise ValueError(f"`fit_examples={value!r}` is no number of rows. Use `auto`, a number such as 2000, or `all`.")


def parse_influence_layers(value: str | list[str] | list[int] | None) -> str | list[int] | None:
    """
    Read `influence_layers` from Python or from the command line.

    Returns:
        `None`, `"last:k"` or `"first:k"`, or a list of layer indices.

    Raises:
        ValueError: if it is none of these.
    """
    if value is None:
        return None
    items: list[Any] = [value] if isinstance(value, (str, int)) else list(value)
    if len(items) == 1 and isinstance(items[0], str):
        end, colon, count = items[0].partition(":")
        if colon and end in ("last", "first") and count.isdigit() and int(count) > 0:
            return items[0]
    try:
        layers = [int(item) for item in items]
    except ValueError:
        layers = []
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(
            f"`influence_layers={value!r}` names no layers. Use `last:8`, `first:8` or different layer indices "
            "such as `0 5 11`."
        )
    return layers
