"""A loop of accelerate's, unchanged, around an adapted model and around PEFT's."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientAccumulationPlugin
from torch.utils.data import DataLoader
from twins import texts, trained, twins

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*deprecated")]


def batches() -> DataLoader:
    rows = [{key: torch.tensor(row[key]) for key in ("input_ids", "attention_mask", "labels")} for row in texts(12)]
    return DataLoader(rows, batch_size=2)  # type: ignore[arg-type]


def loop(model, *, precision="no", save: Path | None = None, resume: Path | None = None) -> list[float]:
    """Six batches, an optimiser's step after every second; state is saved after four, or the loop starts there."""
    AcceleratorState._reset_state(reset_partial_state=True)
    accumulation = GradientAccumulationPlugin(num_steps=2, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_plugin=accumulation)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    model.train()
    if resume:
        accelerator.load_state(str(resume))
        loader = accelerator.skip_first_batches(loader, 4)
    losses = []
    for batch in loader:
        with accelerator.accumulate(model):
            loss = model(**batch).loss
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if save and len(losses) == 4:
            accelerator.save_state(str(save))
    return losses


@pytest.mark.parametrize(("precision", "tolerance"), [("no", 2e-5), ("bf16", 5e-3)])
def test_it_trains_as_peft_does(tmp_path, precision, tolerance):
    ours, theirs = twins(tmp_path)
    mine, other = loop(ours, precision=precision), loop(theirs, precision=precision)
    assert mine == pytest.approx(other, rel=tolerance) and len(set(mine)) == 6
    if precision == "no":
        there = trained(theirs)
        for name, value in trained(ours).items():
            torch.testing.assert_close(value, there[name], rtol=1e-3, atol=1e-4)
    assert len(ours.explain().calls) == 1


@pytest.mark.usefixtures("as_shipped")
def test_a_saved_state_goes_on_where_it_was(tmp_path):
    ours, _ = twins(tmp_path)
    again, _ = twins(tmp_path / "again")
    whole = loop(ours, save=tmp_path / "state")
    assert loop(again, resume=tmp_path / "state") == whole[4:]
    after = trained(again)
    assert after and all(torch.equal(value, after[name]) for name, value in trained(ours).items())
