"""One training step of a GAN: the discriminator's update, then the generator's."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastgan import losses
from fastgan.ema import Ema
from fastgan.errors import FastganError
from fastgan.nn.blocks import is_plain_module
from fastgan.nn.models import Discriminator
from fastgan.nn.stack import ConvStack, as_batches
from fastgan.optim import Adam


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Within it no parameter of `module` requires grad; afterwards each is as before, also after an exception."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class GanStep:
    """One alternating training step: `metrics = step(real)`.

    The discriminator learns from `real` and from fresh fakes, each batch on its own through its BatchNorm; then
    the generator learns from the same fakes seen by the updated discriminator. This is the order of Goodfellow et
    al. (2014), algorithm 1, and of PyTorch's DCGAN example, without the work that the latter throws away: the
    discriminator's parameters are frozen during the generator's update, so no gradient of theirs is computed there.

    Args:
        generator: latents [N, latent_dim] to images [N, C, H, W].
        discriminator: images [N, C, H, W] to logits [N] (or any shape with N elements).
        opt_g, opt_d: optimisers over the parameters of each.
        loss: a name of `fastgan.losses.LOSSES`.
        latent_dim: length of a latent; by default `generator.latent_dim`.
        real_target: below 1 is one-sided label smoothing.
        r1, r2: gamma of the gradient penalties on real and on fake images; gamma / 2 times the penalty is added.
        penalty_interval: penalties are computed on every so many steps and weigh so many times as much
            (lazy regularisation, Karras et al., 2020, arXiv:1912.04958).
        wgan_gp: lambda of WGAN-GP's penalty between real and fake, on every step.
        generator_interval: the generator learns on every so many steps (5 is usual for WGAN-GP).
        joint: real and fake images go through the discriminator as one batch of 2N, each half normalised by statistics
            of its own: the same results in fewer, larger convolutions. Its BatchNorms must be in `ConvStack`s, and
            nothing else in it may mix images. None: on CPUs, in steps without R1 and R2, where the discriminator is
            fastgan's own and each of its layers is sure to treat images so.
        clip_grad: largest norm of all gradients of a network, or None.
        ema: follows the generator after each of its updates, in the same pass where opt_g is `fastgan.optim.Adam`.
        autocast: run both networks under `torch.autocast` with this dtype. Penalties, and with R1 and R2 the whole
            discriminator update of that step, run without it: squares of gradients leave the range of 16 bits.
        scaler: for autocast with float16.
        latents: draws the latents, `latents(n)` -> [n, latent_dim]; by default normal(0, 1) from the global
            generator of the parameters' device.
        process_group: processes that train together, each with its part of the batch, all parts of one size, and the
            same weights and random states. Gradients are averaged over them after each backward pass, and each takes
            its part of what is drawn for all. The networks are not to be wrapped in DistributedDataParallel.
            BatchNorm sees one process's images unless it is `nn.SyncBatchNorm`.

    Raises:
        FastganError: unknown loss, a value out of range, `real_target` with a loss that has no targets.

    `step(real)`: `real` is [N, C, H, W] in [-1, 1] on the networks' device. It returns metrics as tensors [] on that
    device and does not wait for the device itself (torch's GradScaler may): `loss_d`, `loss_g` (where the generator
    learnt), `d_real` = mean D(x) and `d_fake` = mean D(G(z)) before the updates, and the penalties that were computed
    (`r1`, `r2`, `wgan_gp`, without their weights), each of this process's images. Gradients that were there before are
    dropped. `step.steps` and `step.images` (of all processes) count; set both when training goes on from a checkpoint.
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        opt_g: torch.optim.Optimizer,
        opt_d: torch.optim.Optimizer,
        loss: str = "non_saturating",
        *,
        latent_dim: int | None = None,
        real_target: float = 1.0,
        r1: float = 0.0,
        r2: float = 0.0,
        penalty_interval: int = 16,
        wgan_gp: float = 0.0,
        generator_interval: int = 1,
        joint: bool | None = None,
        clip_grad: float | None = None,
        ema: Ema | None = None,
        autocast: torch.dtype | None = None,
        scaler: torch.amp.GradScaler | None = None,
        latents: Callable[[int], Tensor] | None = None,
        process_group: dist.ProcessGroup | None = None,
    ) -> None:
        self.loss = losses.get_loss(loss)
        if real_target != 1.0 and not self.loss.smoothable:
            raise FastganError(f"label smoothing: {loss} has no targets, real_target must stay 1, got {real_target}")
        if not 0.0 < real_target <= 1.0:
            raise FastganError(f"real_target must be in (0, 1], got {real_target}")
        for name, weight in (("r1", r1), ("r2", r2), ("wgan_gp", wgan_gp)):
            if weight < 0:
                raise FastganError(f"{name} must be at least 0, got {weight}")
        for name, interval in (
            ("penalty_interval", penalty_interval),
            ("generator_interval", generator_interval),
        ):
            if interval < 1:
                raise FastganError(f"{name} must be at least 1, got {interval}")
        if clip_grad is not None and clip_grad <= 0:
            raise FastganError(f"clip_grad must be above 0, got {clip_grad}")
        if shared := {id(p) for p in generator.parameters()} & {id(p) for p in discriminator.parameters()}:
            raise FastganError(
                f"GanStep: generator and discriminator share {len(shared)} parameters, which freezing one would freeze "
                "in both; give each its own"
            )
        self.process_group = process_group
        self._rank, self._count = (0, 1) if process_group is None else (process_group.rank(), process_group.size())
        if latents is None:
            latents = self._own_part(_normal_latents(generator, latent_dim))
        self.generator, self.discriminator = generator, discriminator
        self.opt_g, self.opt_d = opt_g, opt_d
        self.real_target = real_target
        self.r1, self.r2, self.wgan_gp = r1, r2, wgan_gp
        self.penalty_interval, self.generator_interval = penalty_interval, generator_interval
        if joint:
            _check_joint(discriminator)
        self.joint = joint
        self.clip_grad, self.ema = clip_grad, ema
        self.autocast, self.scaler = autocast, scaler
        self.latents = latents
        self.steps = 0
        self.images = 0

    def __call__(self, real: Tensor) -> dict[str, Tensor]:
        updates_generator = self.steps % self.generator_interval == 0
        with self.precision(real.device), torch.set_grad_enabled(updates_generator):
            fake = self.generator(self.latents(len(real)))
        metrics = self._update_discriminator(real, fake.detach())
        learnt = len(real) * self._count * self.generator_interval  # images, since the generator's last update
        in_one_pass = isinstance(self.opt_g, Adam)
        if updates_generator:
            if self.ema is not None and isinstance(self.opt_g, Adam):
                self.opt_g.follow(self.ema.averages(self.generator), self.ema.decay(learnt, self.images))
            metrics |= self._update_generator(real, fake)
        if self.scaler is not None:
            self.scaler.update()
        if updates_generator and self.ema is not None:
            self.ema.update(self.generator, learnt, self.images, parameters=not in_one_pass)
        self.steps += 1
        self.images += len(real) * self._count
        return metrics

    def _runs_joint(self, real: Tensor, fake: Tensor, dtype: torch.dtype, penalised: bool) -> bool:
        if self.joint is not None:
            return self.joint
        # What does not fit is for the discriminator to take or refuse. A penalty is on one half: it would be
        # differentiated through both.
        fits = real.shape == fake.shape and real.dtype == dtype and real.device.type == "cpu"
        return fits and not penalised and _treats_images_apart(self.discriminator)

    def _update_discriminator(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        penalised = bool(self.r1 or self.r2) and self.steps % self.penalty_interval == 0
        dtype = next((p.dtype for p in self.discriminator.parameters()), real.dtype)
        if penalised:
            real = real.detach().to(dtype).requires_grad_(bool(self.r1))
            fake = fake.to(dtype).requires_grad_(bool(self.r2))
        with _full_precision(real.device) if penalised else self.precision(real.device):
            if self._runs_joint(real, fake, dtype, penalised):
                with as_batches(self.discriminator, 2):
                    real_logits, fake_logits = self._logits(torch.cat([real, fake])).chunk(2)
            else:
                real_logits = self._logits(real)
                fake_logits = self._logits(fake)
        smoothing = {"real_target": self.real_target} if self.real_target != 1.0 else {}
        if self.loss.with_beliefs is not None:
            loss, d_real, d_fake = self.loss.with_beliefs(real_logits, fake_logits, **smoothing)
        else:
            loss = self.loss.discriminator(real_logits, fake_logits, **smoothing)
            d_real, d_fake = (x.detach().sigmoid().mean() for x in (real_logits, fake_logits))
        metrics = {"loss_d": loss.detach(), "d_real": d_real, "d_fake": d_fake}
        if penalised:
            for name, gamma, logits, images in (
                ("r1", self.r1, real_logits, real),
                ("r2", self.r2, fake_logits, fake),
            ):
                if gamma:
                    penalty = losses.gradient_penalty(logits, images)
                    metrics[name] = penalty.detach()
                    loss = loss + (0.5 * gamma * self.penalty_interval) * penalty
        if self.wgan_gp:
            share = self._own_part(lambda n: torch.rand(n, dtype=dtype, device=real.device))(len(real))
            between = losses.interpolate(real.to(dtype), fake.to(dtype), share)
            with _full_precision(real.device):
                penalty = losses.wgan_gradient_penalty(self._logits(between), between)
            metrics["wgan_gp"] = penalty.detach()
            loss = loss + self.wgan_gp * penalty
        self._descend(loss, self.opt_d)
        return metrics

    def _update_generator(self, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
        with frozen(self.discriminator):
            with self.precision(real.device):
                fake_logits = self._logits(fake)
                if self.loss.paired:
                    with torch.no_grad():
                        real_logits = self._logits(real)
            if self.loss.paired:
                loss = self.loss.generator(fake_logits, real_logits)
            else:
                loss = self.loss.generator(fake_logits)
            self._descend(loss, self.opt_g)
        return {"loss_g": loss.detach()}

    def _logits(self, images: Tensor) -> Tensor:
        return _widened(self.discriminator(images))

    def _own_part(self, draw: Callable[[int], Tensor]) -> Callable[[int], Tensor]:
        """Of numbers drawn for the images of all processes those of this one's: together they see one stream."""
        return lambda n: draw(n * self._count)[n * self._rank :][:n]

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad(set_to_none=True)
        if self.scaler is not None:
            self.scaler.scale(loss).backward()
        else:
            loss.backward()
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self.process_group is not None:
            _average_gradients(parameters, self.process_group)
        if self.clip_grad is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, self.clip_grad)
        if self.scaler is not None:
            self.scaler.step(optimizer)
        else:
            optimizer.step()

    def precision(self, device: torch.device) -> AbstractContextManager:
        """The autocast context in which the networks run."""
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(device.type, self.autocast)


_IMAGE_BY_IMAGE = (nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU, nn.ReLU)


def _treats_images_apart(discriminator: nn.Module) -> bool:
    """Whether images of one batch are known to meet in BatchNorms of a `ConvStack` alone, and no hook sees them."""
    return (
        isinstance(discriminator, Discriminator)
        and is_plain_module(discriminator, Discriminator)
        and is_plain_module(discriminator.main, ConvStack)
        and all(is_plain_module(layer, *_IMAGE_BY_IMAGE) for layer in discriminator.main)
        and not any("forward" in vars(module) for module in discriminator.modules())
    )


def _check_joint(discriminator: nn.Module) -> None:
    within = {id(m) for stack in discriminator.modules() if isinstance(stack, ConvStack) for m in stack.modules()}
    for name, module in discriminator.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and id(module) not in within:
            raise FastganError(
                f"GanStep: joint=True needs every BatchNorm of the discriminator in a ConvStack, {name} is in none; "
                "call fastgan.fuse(discriminator), or leave joint off"
            )


def _average_gradients(parameters: list[Tensor], group: dist.ProcessGroup) -> None:
    """Replace each gradient by its mean over the processes, all in one exchange."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat, group=group)
    flat /= group.size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view(gradient.shape))


def _full_precision(device: torch.device) -> AbstractContextManager:
    """No autocast, whatever surrounds it."""
    if not torch.amp.is_autocast_available(device.type):  # such as "meta"
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _widened(tensor: Tensor) -> Tensor:
    """At least fp32: losses and penalties are taken there, whatever the networks compute in."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _normal_latents(generator: nn.Module, latent_dim: int | None) -> Callable[[int], Tensor]:
    dim = latent_dim if latent_dim is not None else getattr(generator, "latent_dim", None)
    if dim is None:
        raise FastganError(
            f"GanStep: {type(generator).__name__} has no attribute latent_dim; "
            "pass latent_dim=... or latents=a function from n to latents"
        )
    parameter = next(generator.parameters(), None)
    if parameter is None:
        raise FastganError(f"GanStep: {type(generator).__name__} has no parameters to train; pass latents=... if meant")

    def draw(n: int) -> Tensor:
        return torch.randn(n, dim, dtype=parameter.dtype, device=parameter.device)

    return draw
