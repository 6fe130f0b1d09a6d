"""The bar of a training."""

from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_in2core.progress import make_bar


class StepProgress(TrainerCallback):
    """One bar per training with its loss, gone when it ends; outside a terminal a line a minute, after the first."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        shown = not args.disable_tqdm
        self.bar = make_bar(state.max_steps, self.label, "step", shown=shown, initial=state.global_step, brief=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        assert self.bar is not None
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Show the loss beside it."""
        if self.bar is not None and "loss" in kwargs.get("logs", {}):
            self.bar.set_postfix(loss=f"{float(kwargs['logs']['loss']):.4g}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        assert self.bar is not None
        self.bar.close()
