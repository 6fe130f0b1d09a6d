"""Chat templates that print today's date, pinned to one day: the tokens of a row must not change at midnight."""

import copy
import logging
import re
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase


if TYPE_CHECKING:
    from .preparation import Preparation

logger = logging.getLogger(__name__)

_CALL = re.compile(r"strftime_now\(\s*(?P<quote>['\"])(?P<format>.*?)(?P=quote)\s*\)")


def prints_date(template: Any) -> bool:
    """Whether a chat template, or one of several by name, prints the date of the day on which it is rendered."""
    texts = template.values() if isinstance(template, dict) else [template or ""]
    return any("strftime_now(" in text for text in texts)


def read_clock(processing_class: PreTrainedTokenizerBase) -> datetime:
    """The time that templates print now."""
    clock = "{{ strftime_now('%Y-%m-%dT%H:%M:%S') }}"
    rendered = processing_class.apply_chat_template(
        [{"role": "user", "content": ""}], chat_template=clock, tokenize=False
    )
    return datetime.fromisoformat(str(rendered))


def pin_template(template: Any, day: datetime) -> Any:
    """A chat template, or several by name, with the date written into it; a form made up as it goes stays a call."""
    if isinstance(template, dict):
        return {name: pin_template(text, day) for name, text in template.items()}
    return template and _CALL.sub(lambda call: repr(day.strftime(call["format"])), template)


def pin_tokenizer(processing_class: PreTrainedTokenizerBase, day: datetime) -> PreTrainedTokenizerBase:
    """A tokenizer whose chat template prints the date of one day; the one given stays as it is."""
    if not prints_date(processing_class.chat_template):
        return processing_class
    pinned = copy.copy(processing_class)
    pinned.chat_template = pin_template(processing_class.chat_template, day)
    return pinned


def pin_date(preparation: "Preparation", warn: bool) -> "Preparation":
    """
    The same preparation with the date that the chat template prints now, for every later day.

    Args:
        preparation ([`Preparation`]):
            How rows are prepared today.
        warn (`bool`):
            Whether this process tells of it.
    """
    templates = [preparation.chat_template, preparation.processing_class.chat_template]
    if not any(map(prints_date, templates)):
        return preparation
    day = read_clock(preparation.processing_class)
    pinned = replace(
        preparation,
        processing_class=pin_tokenizer(preparation.processing_class, day),
        chat_template=pin_template(preparation.chat_template, day),
    )
    if warn and any(map(prints_date, [pinned.chat_template, pinned.processing_class.chat_template])):
        logger.warning(
            "The chat template prints the date in a form that it makes up as it goes, so that it cannot be pinned: "
            "scores of conversations change from day to day. Write `strftime_now('%d %b %Y')`, or the date itself, "
            "into the template (`chat_template_path`)."
        )
    elif warn:
        logger.warning(
            "The chat template prints the date, %s today. The scorer keeps this date, so that a row scores the same "
            "on any day; SFT itself prints that of the day on which it runs.",
            day.date(),
        )
    return pinned
