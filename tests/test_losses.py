"""Losses against monai and numbers computed by hand."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss

from losses import cldice_loss, dice_bce, dice_ce, dice_loss, gi_tract_dice_ce

pytestmark = pytest.mark.numeric

torch.manual_seed(0)
LOGITS = torch.randn(3, 2, 9, 7, dtype=torch.float64)
MASKS = (torch.rand(3, 2, 9, 7) > 0.6).double()


@pytest.mark.parametrize("smooth", [1.0, 1e-5])
@pytest.mark.parametrize("shape", [(3, 2, 9, 7), (2, 1, 4, 5, 6)])
def test_dice_equals_monai(smooth, shape):
    p, t = torch.rand(shape).double(), (torch.rand(shape) > 0.5).double()
    monai = DiceLoss(smooth_nr=smooth, smooth_dr=smooth, reduction="none")(p, t).flatten(1)
    torch.testing.assert_close(dice_loss(p, t, smooth), monai, rtol=1e-12, atol=0)


def test_dice_by_hand():
    p = torch.tensor([[[0.5, 1.0, 0.0, 0.25]]])
    t = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    expected = 1 - (2 * 1.5 + 1) / (1.75 + 2 + 1)
    assert dice_loss(p, t).item() == pytest.approx(expected)
    assert (
        dice_loss(torch.zeros(1, 1, 4), torch.zeros(1, 1, 4)).item() == 0
    )  # nothing there, nothing said


def test_dice_bce_is_the_sum_of_its_parts():
    loss, parts = dice_bce(LOGITS, MASKS)
    dice = DiceLoss(sigmoid=True, smooth_nr=1, smooth_dr=1)(LOGITS, MASKS)
    bce = F.binary_cross_entropy_with_logits(LOGITS, MASKS)
    torch.testing.assert_close(parts, {"dice_loss": dice, "bce": bce}, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, dice + bce, rtol=1e-12, atol=0)


def test_ignored_pixels_change_nothing_and_get_no_gradient():
    target = MASKS.clone()
    target[..., 3:] = 255
    logits = LOGITS.clone().requires_grad_()
    loss, _ = dice_bce(logits, target)
    torch.testing.assert_close(
        loss, dice_bce(LOGITS[..., :3], MASKS[..., :3])[0], rtol=1e-12, atol=0
    )
    loss.backward()
    assert not logits.grad[..., 3:].any() and logits.grad[..., :3].all()
    loss, _ = dice_bce(LOGITS, torch.full_like(MASKS, 255))
    assert loss == 0


def test_bce_of_an_image_does_not_depend_on_what_another_ignores():
    target = MASKS.clone()
    target[0, :, 1:] = 255
    each = [dice_bce(LOGITS[i : i + 1], target[i : i + 1])[0] for i in range(3)]
    torch.testing.assert_close(
        dice_bce(LOGITS, target)[0], torch.stack(each).mean(), rtol=1e-12, atol=0
    )


def test_dice_ce_over_the_classes_present():
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64, requires_grad=True)
    target = torch.zeros(2, 5, 6, dtype=torch.int64)
    target[0, :2], target[0, 2:4, :3], target[1, 0, 0] = 1, 3, 255
    loss, parts = dice_ce(logits, target)
    p, keep = logits.softmax(1), target != 255
    terms = [
        dice_loss(p[:1, k : k + 1], (target[:1] == k)[:, None].double()).squeeze() for k in (1, 3)
    ]
    torch.testing.assert_close(parts["dice_loss"], sum(terms) / 2, rtol=1e-12, atol=0)
    ce = -logits.log_softmax(1).gather(1, torch.where(keep, target, 0)[:, None])[:, 0][keep].mean()
    torch.testing.assert_close(parts["ce"], ce, rtol=1e-12, atol=0)
    torch.testing.assert_close(loss, parts["dice_loss"] + parts["ce"])
    loss.backward()
    assert not logits.grad[1, :, 0, 0].any()


def test_dice_ce_of_background_alone_is_cross_entropy():
    logits = torch.randn(1, 3, 4, 4)
    loss, parts = dice_ce(logits, torch.zeros(1, 4, 4, dtype=torch.int64))
    assert parts["dice_loss"] == 0 and loss == parts["ce"]


def test_gradients():
    logits = LOGITS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dice_bce(x, MASKS)[0], logits)
    target = torch.randint(0, 2, (3, 9, 7))
    assert torch.autograd.gradcheck(lambda x: dice_ce(x, target)[0], logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [dice_bce, dice_ce, gi_tract_dice_ce, dice_loss, cldice_loss])
def test_half_precision_is_refused(loss, dtype):
    """In float16 the sums of a 352-pixel mask overflow: Dice was 1 whatever the prediction."""
    logits = torch.zeros(1, 2, 352, 352)
    masks = torch.ones(1, 2, 352, 352)
    target = masks[:, 0].long() if loss in (dice_ce, gi_tract_dice_ce) else masks
    loss(logits, target)
    with pytest.raises(ValueError, match="losses need float32 or float64"):
        loss(logits.to(dtype), target)
