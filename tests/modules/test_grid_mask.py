import torch

from rigfuse.modules.grid_mask import grid_mask


def test_a_grid_of_squares_is_blank_in_all_images_alike():
    torch.manual_seed(0)
    shares = []
    for _ in range(40):
        masked = grid_mask(torch.ones(2, 3, 60, 90), 1.0)
        assert (masked == masked[0, 0]).all()
        blank = masked[0, 0] == 0
        rows, columns = blank.any(1), blank.any(0)
        assert torch.equal(blank, rows[:, None] & columns) and blank.any()
        shares.append(blank.float().mean().item())
    assert 0.2 < sum(shares) / len(shares) < 0.32


def test_it_is_drawn_by_its_probability_and_repeats():
    images = torch.ones(1, 3, 16, 24, requires_grad=True)
    assert grid_mask(images, 0.0) is images
    torch.manual_seed(1)
    drawn = [grid_mask(images, 0.3) for _ in range(200)]
    assert 30 < sum(masked is not images for masked in drawn) < 90
    torch.manual_seed(1)
    again = [grid_mask(images, 0.3) for _ in range(200)]
    assert all(torch.equal(a, b) for a, b in zip(drawn, again))
    last = next(masked for masked in drawn if masked is not images)
    last.sum().backward()
    assert torch.equal(images.grad, last.detach())
