"""A killed training session goes on exactly."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scripts.miniature.world.session import Schedule, Session


class Killed(Exception):
    """Stands for a kill."""


def run(folder: Path, kill_at: int | None = None) -> list[Tensor]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1))
    session = Session(folder, {"net": net}, Schedule(steps=12, batch=4, lr=0.05, warmup=2, save_every=4))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        if step == kill_at:
            raise Killed
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        return (net(x) - x.sum(1, keepdim=True)).square().mean(), {}

    session.run(loss, dict)
    return [*net.state_dict().values(), *session.average]


@pytest.mark.parametrize("kill_at", [3, 6, 11])
def test_a_killed_session_ends_as_an_uninterrupted_one(tmp_path: Path, kill_at: int) -> None:
    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "killed", kill_at)
    for a, b in zip(whole, run(tmp_path / "killed"), strict=True):
        assert torch.equal(a, b)
    assert json.loads((tmp_path / "killed" / "state" / "state.json").read_text())["step"] == 12


def test_a_non_finite_loss_changes_nothing(tmp_path: Path) -> None:
    net = nn.Linear(1, 1)
    before = net.weight.clone()
    session = Session(tmp_path, {"net": net}, Schedule(steps=3, batch=1, lr=1.0))
    with pytest.raises(FloatingPointError, match="step 0"):
        session.run(lambda step: (net.weight.sum() * float("nan"), {}), dict)
    assert torch.equal(net.weight, before)
