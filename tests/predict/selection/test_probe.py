import numpy as np
import pytest
import torch

from scale.data.rows import RowReader
from scale.parallel.ranks import Ranks
from tests.data.test_rows import InMemory
from tests.predict.selection.parts import DOCUMENTS
from tests.predict.selection.training import probe_of


def test_a_probe_gives_the_loss_of_each_document_alone_and_changes_nothing():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    spans, found, root = probe_of(Ranks(), DOCUMENTS)
    torch.set_rng_state(before)
    assert root.training and found.tokens == sum(s.length for s in spans) and found.forwards > 2
    with torch.no_grad():
        for span, loss in zip(spans, found.losses_N, strict=True):
            term = root(RowReader(DOCUMENTS).batch([[span]], span.length)).terms["lm"]
            assert loss == pytest.approx(float(term.total / term.count), rel=1e-5)


def test_documents_without_a_learned_token_say_nothing():
    masked = InMemory([[5, 6, 7, 2], [5, 6, 7, 2]], [[1, 0, 0, 0], [1, 1, 1, 1]])
    spans, found, _ = probe_of(Ranks(), [InMemory(masked.docs * 30, masked.masks * 30)])
    silent = np.array([span.doc % 2 == 0 for span in spans])
    assert np.array_equal(np.isnan(found.losses_N), silent)
