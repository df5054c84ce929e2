"""Components: those of all rows at once, though rows come in batches."""

import torch

from lorafx.model.components import Components


def test_components_are_those_of_all_rows_at_once():
    torch.manual_seed(0)
    rows = torch.randn(120, 10) * torch.logspace(0, -3, 10) + torch.arange(10.0)
    found = Components(3)
    for batch in rows.split(30):
        found.update(batch)
    _, s, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    torch.testing.assert_close((found.directions @ vh[:3].t()).abs(), torch.eye(3), rtol=0, atol=2e-2)
    torch.testing.assert_close(found.values, s[:3], rtol=1e-2, atol=0)
    torch.testing.assert_close(found.explained, s[:3] ** 2 / (s**2).sum(), rtol=2e-2, atol=0)


def test_a_layer_that_is_given_rounding_alone_gets_no_rank():
    rows = 0.1 + 1e-8 * torch.randn(40, 8)
    found = Components(3)
    found.update(rows)
    assert found.spread > 0 and not found.explained.any()
