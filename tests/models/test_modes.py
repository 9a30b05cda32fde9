"""Evaluation for a while: by itself, and wherever weights are looked at in the middle of training."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import nn

from scale.data.rows import RowReader
from scale.evaluate.generate import generate
from scale.models.leak import refuse_leaks
from scale.models.modes import evaluating
from scale.objectives.causal_lm import CausalLM
from scale.objectives.root import Root
from scale.parallel.ranks import Ranks
from scale.parallel.single import Single
from scale.predict.selection.probe import ForwardProbe
from tests.evaluate.test_held_out import judge
from tests.models.test_build import tiny
from tests.predict.selection.parts import DOCUMENTS
from tests.predict.selection.training import probe_of
from tests.train.parts import Numbers, stepper


def modes(module: nn.Module) -> list[bool]:
    return [part.training for part in module.modules()]


def partly_frozen(module: nn.Module) -> list[bool]:
    """Training mode but for the last submodule; the modes that makes."""
    module.train()
    list(module.modules())[-1].eval()
    assert set(modes(module)) == {True, False}
    return modes(module)


@pytest.mark.parametrize("whole", [True, False])
def test_every_part_is_in_its_own_mode_again_also_after_an_error(whole: bool) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.BatchNorm1d(2))).train(
        whole
    )
    model[1].train(not whole), model[2][0].train(not whole)
    before = modes(model)
    with evaluating(model):
        assert not any(modes(model)) and not torch.is_grad_enabled()
    assert modes(model) == before and torch.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), evaluating(model):
        _ = 1 / 0
    assert modes(model) == before


def test_parts_that_do_more_in_train_are_told() -> None:
    class Merging(nn.Linear):
        told: ClassVar[list[bool]] = []

        def train(self, mode: bool = True) -> Merging:
            self.told.append(mode)
            return super().train(mode)

    model = nn.Sequential(Merging(2, 2))
    with evaluating(model):
        pass
    assert Merging.told == [False, True]


def test_check_losses_leave_the_modes() -> None:
    made = stepper()
    before = partly_frozen(made.root)
    made.score(Numbers(8).draw())
    assert modes(made.root) == before


def test_held_out_losses_leave_the_modes() -> None:
    judged = judge(100)
    before = partly_frozen(judged.root)
    judged.score()
    assert modes(judged.root) == before


def test_losses_of_documents_leave_the_modes() -> None:
    spans, _, root = probe_of(Ranks(), DOCUMENTS)
    before = partly_frozen(root)
    ForwardProbe(root, Single("cpu"), RowReader(DOCUMENTS), 32, 4)(spans)
    assert modes(root) == before


def test_the_question_for_leaks_leaves_the_modes() -> None:
    root = Root(tiny(), CausalLM())
    before = partly_frozen(root)
    refuse_leaks(root, 100)
    assert modes(root) == before


class Letters:
    """As much of a tokenizer as continuing a prompt takes."""

    eos_token_id = bos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool) -> Letters:
        self.input_ids = [3 + ord(letter) % 90 for letter in text]
        return self

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return " ".join(map(str, ids))


def test_text_from_a_model_leaves_the_modes() -> None:
    model = tiny()
    before = partly_frozen(model)
    assert generate(model, Letters(), ["a"], max_new_tokens=3)
    assert modes(model) == before
