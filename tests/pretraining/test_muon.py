import torch

from pretraining.muon import Muon, orthogonalise


def test_orthogonalise_moves_singular_values_near_one() -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(3, 24, 40)))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_step_agrees_with_torch_muon() -> None:
    """torch's own Muon orthogonalises in bfloat16, hence the tolerance."""
    torch.manual_seed(0)
    start = [torch.randn(16, 32), torch.randn(32, 16), torch.randn(16, 16)]
    ours = [torch.nn.Parameter(value.clone()) for value in start]
    theirs = [torch.nn.Parameter(value.clone()) for value in start]
    optimizers = (
        Muon(ours, lr=0.01, weight_decay=0.02),
        torch.optim.Muon(theirs, lr=0.01, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
    )
    for _ in range(3):
        gradients = [torch.randn_like(value) for value in start]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for mine, reference, value in zip(ours, theirs, start, strict=True):
        moved = (reference - value).norm()
        assert (mine - reference).norm() < 0.02 * moved
