import pytest
import torch

from wn21k_zoo.training.mixing import mix

IMAGES = torch.arange(4.0)[:, None, None, None].expand(4, 3, 20, 30) / 4


def test_nothing_is_mixed_unless_it_is_asked_for():
    images, share = mix(IMAGES, 0.0, 0.0)
    assert images is IMAGES
    assert share == 1


@pytest.mark.parametrize("alpha", [0.2, 1.0])
def test_mixup_adds_up_pixels_in_the_share_that_it_gives(alpha):
    shares = []
    for seed in range(400):
        torch.manual_seed(seed)
        mixed, share = mix(IMAGES, alpha, 0.0)
        torch.testing.assert_close(mixed, share * IMAGES + (1 - share) * IMAGES.flip(0))
        shares.append(share)
    found = torch.tensor(shares)
    assert found.mean() == pytest.approx(0.5, abs=0.06)
    assert found.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.15)  # of the Beta distribution


def test_cutmix_puts_a_rectangle_of_the_other_image_into_each():
    shares, centres = [], []
    for seed in range(400):
        torch.manual_seed(seed)
        mixed, share = mix(IMAGES, 0.0, 1.0)
        others = mixed != IMAGES
        assert torch.equal(mixed, torch.where(others, IMAGES.flip(0), IMAGES))
        assert (others == others[:1, :1]).all()  # the same in all
        assert share == pytest.approx(1 - float(others[0, 0].float().mean()))
        rows, columns = others[0, 0].any(1).nonzero(), others[0, 0].any(0).nonzero()
        shares.append(share)
        if len(rows):
            assert others[0, 0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
            centres.append([float(rows.float().mean() + 0.5) / 20, float(columns.float().mean() + 0.5) / 30])
    found = torch.tensor(shares)
    assert 0.5 < found.mean() < 0.75  # what would lie outside is cut off
    assert found.min() < 0.3
    assert found.max() > 0.99
    assert torch.tensor(centres).mean(0).tolist() == pytest.approx([0.5, 0.5], abs=0.04)


def test_with_both_each_has_half_of_the_batches():
    cuts = 0
    for seed in range(400):
        torch.manual_seed(seed)
        mixed, _ = mix(IMAGES, 1.0, 1.0)
        cuts += set(mixed.unique().tolist()) <= {0.0, 0.25, 0.5, 0.75}
    assert cuts == pytest.approx(200, abs=40)


def test_one_image_stays_as_it_is():
    for ways in ((1.0, 0.0), (0.0, 1.0)):
        torch.testing.assert_close(mix(IMAGES[2:3], *ways)[0], IMAGES[2:3])


def test_a_rectangle_may_touch_every_edge():
    touched = set()
    for seed in range(100):
        torch.manual_seed(seed)
        others = (mix(IMAGES, 0.0, 1.0)[0] != IMAGES)[0, 0]
        edges = {"top": others[0], "bottom": others[-1], "left": others[:, 0], "right": others[:, -1]}
        touched |= {edge for edge, part in edges.items() if part.any()}
    assert touched == {"top", "bottom", "left", "right"}
