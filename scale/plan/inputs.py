"""What a plan needs of the data, without reading them: the size of the vocabulary, and of an epoch where that counts."""

from __future__ import annotations

from scale.build import make_planner, mix
from scale.config import PretrainRun
from scale.data import tokenizer as tokenizers
from scale.data.prepare import is_prepared, prepare
from scale.errors import UsageError
from scale.facts import shown_passes
from scale.models.presets import PRESETS
from scale.train.facts import total_steps


def vocabulary(config: PretrainRun) -> int | None:
    """Entries of the run's tokenizer; None where the model has its vocabulary of its own.

    Raises UsageError where only data that were never tokenised could say.
    """
    preset = config.model.preset
    if preset is None or "vocab_size" in {**PRESETS[preset], **config.model.overrides}:
        return None
    tokenizer = config.data.tokenizer
    if tokenizer is not None:
        return tokenizer.vocab_size or len(tokenizers.load(str(tokenizer.path)))
    if not _is_prepared(config):
        raise UsageError(
            f"model.preset = {preset!r}: its vocabulary is the data's, which are not there yet "
            "(give model.overrides.vocab_size=..., such as 32768)"
        )
    prepared = prepare(config.data, progress=False)
    largest = max(documents.max_id for documents in (*prepared.train, *prepared.valid)) + 1
    return max(largest, len(prepared.tokenizer) if prepared.tokenizer is not None else 0)


def length(config: PretrainRun) -> tuple[int, float, str]:
    """Optimizer steps of the run, the share of a row that is not padding (1 where the data are not looked at), and how often
    each source is seen ("" then).

    Raises UsageError for epochs over data that were never tokenised.
    """
    if config.train.epochs is None:
        return total_steps(config, 0, fill=1.0), 1.0, ""
    if not _is_prepared(config):
        raise UsageError(
            f"train.epochs = {config.train.epochs:g}: the data are not tokenised yet, so the size of an epoch is unknown "
            "(give train.tokens=... train.epochs=null, or run scale data tokenize first)"
        )
    prepared = prepare(config.data, progress=False)
    fill = make_planner(config, prepared, steps=1).fill()
    steps = total_steps(config, sum(prepared.positions()), fill)
    return steps, fill, shown_passes(config, prepared, mix(config, prepared), steps, fill)


def _is_prepared(config: PretrainRun) -> bool:
    try:
        return is_prepared(config.data)
    except UsageError:  # a source that is not there
        return False
