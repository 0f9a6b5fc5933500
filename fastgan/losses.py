"""GAN losses and penalties: pure functions of logits, and of images for the penalties.

With D(x) = sigmoid(logit), the textbook's game is min over G, max over D of

    V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))]

D *maximises* V, so the discriminator's loss is -V; G *minimises* V, of which only the second term depends on it.
Every function is finite for logits of +-100 in fp32 (log sigmoid is never taken as log(sigmoid(x))), returns a mean
over the batch [], and can be differentiated twice.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fastgan.errors import FastganError
from fastgan.ops import gan_bce, gan_bce_generator
from fastgan.ops.gan_bce import bce


def value(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The textbook's V(D, G) = E[log D(x)] + E[log(1 - D(G(z)))] (Goodfellow et al., 2014, arXiv:1406.2661).

    At most 0; -log 4 where D cannot tell real from fake. D ascends it, G descends it.
    """
    return F.logsigmoid(real_logits).mean() + F.logsigmoid(-fake_logits).mean()


def bce_discriminator(real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0) -> Tensor:
    """-V(D, G): cross-entropy of real as 1 and fake as 0.

    `real_target` below 1 is one-sided label smoothing (Salimans et al., 2016, arXiv:1606.03498).
    """
    return bce_with_beliefs(real_logits, fake_logits, real_target)[0]


def bce_with_beliefs(
    real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """`bce_discriminator`, and the means of D(x) and D(G(z)) (detached) from the same pass over the logits."""
    loss_real, loss_fake, d_real, d_fake = gan_bce(real_logits, fake_logits, real_target=real_target)
    assert loss_real is not None and loss_fake is not None and d_real is not None and d_fake is not None  # noqa: PT018
    return loss_real + loss_fake, d_real, d_fake


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """-E[log D(G(z))]: the same fixed point as the minimax loss, with a gradient where D is sure of itself."""
    return gan_bce_generator(fake_logits)[0]


def minimax_generator(fake_logits: Tensor) -> Tensor:
    """E[log(1 - D(G(z)))], the part of V that G descends; its gradient vanishes where D is sure of itself."""
    return gan_bce_generator(fake_logits, saturating=True)[0]


def least_squares_discriminator(real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0) -> Tensor:
    """Squares of the distance to `real_target` and 0, halved (Mao et al., 2017, arXiv:1611.04076)."""
    return 0.5 * ((real_logits - real_target).square().mean() + fake_logits.square().mean())


def least_squares_generator(fake_logits: Tensor) -> Tensor:
    """Square of the distance of the fake logits to 1, halved."""
    return 0.5 * (fake_logits - 1.0).square().mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Margin of 1 on both sides (Lim and Ye, 2017, arXiv:1705.02894)."""
    return F.relu(1.0 - real_logits).mean() + F.relu(1.0 + fake_logits).mean()


def wasserstein_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """E[D(G(z))] - E[D(x)] of an unbounded critic (Arjovsky et al., 2017, arXiv:1701.07875)."""
    return fake_logits.mean() - real_logits.mean()


def wasserstein_generator(fake_logits: Tensor) -> Tensor:
    """-E[D(G(z))]; the generator's part of the Wasserstein and of the hinge loss."""
    return -fake_logits.mean()


def relativistic_average_discriminator(real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0) -> Tensor:
    """Real above the average fake, fake below the average real (Jolicoeur-Martineau, 2019, arXiv:1807.00734)."""
    return bce(real_logits - fake_logits.mean(), real_target) + bce(fake_logits - real_logits.mean(), 0.0)


def relativistic_average_generator(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """The discriminator's loss with real and fake exchanged."""
    return relativistic_average_discriminator(fake_logits, real_logits)


def relativistic_paired_discriminator(real_logits: Tensor, fake_logits: Tensor, real_target: float = 1.0) -> Tensor:
    """Each real above the fake it is paired with (Jolicoeur-Martineau, 2019; Huang et al., 2024, arXiv:2501.05441).

    `real_logits` and `fake_logits` must both be [N].
    """
    _same_shape("relativistic_paired", real_logits, fake_logits)
    return bce(real_logits - fake_logits, real_target)


def relativistic_paired_generator(fake_logits: Tensor, real_logits: Tensor) -> Tensor:
    """Each fake above the real it is paired with."""
    _same_shape("relativistic_paired", real_logits, fake_logits)
    return bce(fake_logits - real_logits, 1.0)


def gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E[|d logits / d images|^2]: R1 on real images, R2 on fakes (Mescheder et al., 2018, arXiv:1801.04406).

    The loss adds gamma / 2 times this. `images` [N, C, H, W] must require grad and `logits` [N] come from them.
    """
    return _image_gradient(logits, images).square().sum(1).mean()


def wgan_gradient_penalty(logits: Tensor, images: Tensor) -> Tensor:
    """E[(|d logits / d images| - 1)^2] for critics of `interpolate`d images (Gulrajani et al., 2017, arXiv:1704.00028).

    The loss adds lambda times this, lambda = 10 in the paper. Shapes as in `gradient_penalty`.
    """
    squared = _image_gradient(logits, images).square().sum(1)
    # The root's slope is infinite at 0: an image without influence contributes the constant 1 instead of NaN.
    norm = torch.where(squared > 0, squared, 1.0).sqrt() * (squared > 0)
    return (norm - 1.0).square().mean()


def interpolate(real: Tensor, fake: Tensor, share: Tensor | None = None) -> Tensor:
    """A point between each pair of images [N, ...], the `share` [N] of the way (by default random); detached, requires
    grad."""
    _same_shape("interpolate", real, fake)
    if share is None:
        share = torch.rand(len(real), dtype=real.dtype, device=real.device)
    return torch.lerp(real.detach(), fake.detach(), share.view(-1, *[1] * (real.dim() - 1))).requires_grad_()


def _image_gradient(logits: Tensor, images: Tensor) -> Tensor:
    if not images.requires_grad:
        raise FastganError(
            "gradient penalty: images must require grad before the discriminator sees them: images.requires_grad_()"
        )
    if _is_compiled(logits):
        raise FastganError(
            "gradient penalty: the images went through code that torch.compile compiled with its default backend, and "
            "PyTorch cannot differentiate that twice. Give the penalty the discriminator itself, not the compiled one "
            "(GanStep: pass it uncompiled where r1, r2 or wgan_gp is used)"
        )
    (gradient,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return gradient.flatten(1)


def _is_compiled(output: Tensor) -> bool:
    """Whether AOTAutograd compiled a function that `output` came through: its node, and only that, is of that name."""
    nodes, seen = [output.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CompiledFunctionBackward":
            return True
        seen.add(node)
        nodes += [parent for parent, _ in node.next_functions]
    return False


def _same_shape(loss: str, real: Tensor, fake: Tensor) -> None:
    if real.shape != fake.shape:
        raise FastganError(
            f"{loss} pairs real with fake: expected equal shapes, got {list(real.shape)} and {list(fake.shape)}"
        )


@dataclass(frozen=True)
class Loss:
    """The two sides of a game. `generator` takes (fake_logits) or, where `paired`, (fake_logits, real_logits)."""

    discriminator: Callable[..., Tensor]
    generator: Callable[..., Tensor]
    paired: bool = False
    smoothable: bool = True  # whether `real_target` means something
    with_beliefs: Callable[..., tuple[Tensor, Tensor, Tensor]] | None = None  # also D(x) and D(G(z)), in one pass


LOSSES: dict[str, Loss] = {
    "non_saturating": Loss(bce_discriminator, non_saturating_generator, with_beliefs=bce_with_beliefs),
    "minimax": Loss(bce_discriminator, minimax_generator, with_beliefs=bce_with_beliefs),
    "least_squares": Loss(least_squares_discriminator, least_squares_generator),
    "hinge": Loss(hinge_discriminator, wasserstein_generator, smoothable=False),
    "relativistic_average": Loss(relativistic_average_discriminator, relativistic_average_generator, paired=True),
    "relativistic_paired": Loss(relativistic_paired_discriminator, relativistic_paired_generator, paired=True),
    "wasserstein": Loss(wasserstein_discriminator, wasserstein_generator, smoothable=False),
}


def get_loss(name: str) -> Loss:
    """The loss called `name`; FastganError that lists the known ones where there is none."""
    if name not in LOSSES:
        raise FastganError(f"loss must be one of {', '.join(LOSSES)}, got {name!r}")
    return LOSSES[name]
