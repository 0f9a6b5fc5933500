"""bn_act: BatchNorm and LeakyReLU in one operation. The public function, its definition, its schemas and
gradients.

With n values per channel, mean and biased variance over them, r = 1/sqrt(var + eps) and s = weight * r:

    v = s*(y - mean) + bias        z = v if v > 0 else slope*v
    g = dz * phi'(v)               grad_bias = sum(g)      grad_weight = r * sum(g*(y - mean))
    dy = s*g - (s*r*grad_weight/n)*(y - mean) - s*grad_bias/n          (frozen statistics: dy = s*g)

The split operations (`bn_stats`, `bn_act`, `bn_act_reduce`, `bn_act_backward`) are what a backend supplies
(`fastgan.backends`). Autograd belongs to `bn_act_train` and `bn_act_eval`, which are made of them; a second
derivative is taken through the definition. Ioffe and Szegedy, "Batch Normalization", 2015.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from fastgan.backends import Choice, Decision, choose, chosen, count, is_plain, note, requested, run
from fastgan.ops._library import direct, gradient_of_gradient, is_heard, register
from fastgan.ops.bn_act_eager import activation, apply, dense, like, stat_dtype, stats

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def bn_act(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
    negative_slope: float = 0.2,
    process_group: "ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """BatchNorm followed by LeakyReLU, `leaky_relu(batch_norm(input, ...), negative_slope)`.

    Args:
        input: `[N, C]` or `[N, C, ...]`, fp32, fp16, bf16 or fp64; dense contiguous or channels-last, else
            it is copied once to channels-last (4-D) or contiguous.
        running_mean, running_var: `[C]`, updated in place in training (`running_var` with the unbiased
            variance) unless None; what normalises in eval, where they are required.
        weight, bias: `[C]` or None (1 and 0); fp32 beside an fp16 or bf16 input is what autocast gives.
        training: normalise by the batch's own statistics.
        momentum: weight of the batch in the running statistics, in [0, 1].
        eps: added to the variance.
        negative_slope: 0 is ReLU, 1 the identity.
        process_group: in training, normalise by the statistics over all its processes, each of which calls this
            with a batch of its own (`fastgan/ops/bn_act_sync.py`); None: by those of `input` alone.
        backend: None (the best that is proved), "eager", "cpu", "triton" or "cuda".

    Returns:
        A tensor like `input`. Differentiable any number of times by input, weight and bias; the first time
        by the backend's kernels, then through the definition. Kept for backward: input and O(C).

    Raises:
        ValueError: a shape or dtype does not fit, momentum is out of its range, or there is one value per channel in
            training.
        BackendError: the backend that was asked for cannot run.
    """
    if training and (momentum is None or not 0.0 <= momentum <= 1.0):
        raise ValueError(f"bn_act: momentum must be in [0, 1], got {momentum}")
    if process_group is not None and training:
        _check(input, running_mean, running_var, weight, bias, training, eps, alone=False)
        from fastgan.ops.bn_act_sync import bn_act_sync

        backend = requested(backend)
        return bn_act_sync(
            input, running_mean, running_var, weight, bias, momentum, eps, negative_slope, process_group, backend
        )
    choice = chosen("bn_act", input, backend)
    try:  # torch's function and the whole kernels check their arguments themselves; `_check` explains
        if choice.definition and not (training and (choice.single or eps <= 0)):
            count("eager", "bn_act")
            cudnn = torch.backends.cudnn.enabled
            v = torch.batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps, cudnn)
            return activation(v, negative_slope)
        if choice.whole and eps > 0 and (training or running_mean is not None) and not is_heard():
            if not choice.dense:
                input = dense(input)
            how = (choice, eps, negative_slope, training, running_mean, running_var, momentum)
            return _Whole.apply(how, input, weight, bias)
    except (RuntimeError, ValueError, IndexError):  # the last for an input without channels
        _check(input, running_mean, running_var, weight, bias, training, eps)
        raise
    _check(input, running_mean, running_var, weight, bias, training, eps)
    input = dense(input)
    if choice.plain and not is_heard():
        if training:
            return direct.bn_act_train(
                input, weight, bias, eps, negative_slope, choice, running_mean, running_var, momentum
            )[0]
        return direct.bn_act_eval(input, weight, bias, running_mean, running_var, eps, negative_slope, choice)
    ops, backend = torch.ops.fastgan, choice.asked
    if not training:
        return ops.bn_act_eval(input, weight, bias, running_mean, running_var, eps, negative_slope, backend)
    z, mean, var = ops.bn_act_train(input, weight, bias, eps, negative_slope, backend)
    if running_mean is not None:
        n = input.numel() // input.shape[1]
        ops.update_running_stats(running_mean, running_var, mean, var, n, momentum, backend)
    return z


_NOT_MEASURED = Decision("eager", "an activation without BatchNorm is not measured")


def act(input: Tensor, negative_slope: float, backend: str | None, *statistics_and_parameters: Tensor | None) -> Tensor:
    """What follows the convolution of a block without BatchNorm; `input` is overwritten where eager runs (nobody else
    may read it).

    Other backends run bn_act's kernels with mean 0, variance 1 and no parameters, which leave v = y bit for
    bit. On CPUs only on request: the table of what is faster was measured with BatchNorm.
    """
    if any(t is not None for t in statistics_and_parameters):
        raise ValueError("batch_norm=False takes no running statistics and no BatchNorm parameters, got some")
    if negative_slope == 1:
        return input
    if input.is_cpu and requested(backend) is None:
        note("bn_act", input, _NOT_MEASURED)
        count("eager", "act")
        return activation(input, negative_slope)
    choice = chosen("bn_act", input, backend)
    if choice.definition:
        count("eager", "act")
        return activation(input, negative_slope)
    constants = (None, None, None, None, 0.0, negative_slope)
    if choice.plain and not is_heard():
        return direct.bn_act_eval(dense(input), *constants, choice)
    return torch.ops.fastgan.bn_act_eval(dense(input), *constants, choice.asked)


def check_images(operation: str, input: Tensor) -> None:
    """A convolution takes `[C, H, W]` too, of whose output BatchNorm would take the rows for channels."""
    if input.dim() != 4:
        raise ValueError(f"{operation}: input must be [N, C, H, W] where BatchNorm follows, got {list(input.shape)}")


def _check(input, running_mean, running_var, weight, bias, training, eps, alone=True) -> None:
    if input.dim() < 2 or not input.is_floating_point():
        raise ValueError(f"bn_act: input must be a floating [N, C, ...], got {list(input.shape)} {input.dtype}")
    shape, dtype, device = (input.shape[1],), input.dtype, input.device
    for value in (running_mean, running_var, weight, bias):
        if value is not None and (value.shape != shape or value.dtype != dtype or value.device != device):
            _check_parameters(input, running_mean=running_mean, running_var=running_var, weight=weight, bias=bias)
            break
    if (running_mean is None) != (running_var is None):
        raise ValueError("bn_act: running_mean and running_var go together, got one of them")
    if training:
        if eps <= 0:
            raise ValueError(f"bn_act: eps must be positive in training, got {eps}")
        if input.numel() == shape[0] and alone:
            raise ValueError(
                f"bn_act: expected more than 1 value per channel in training, got input {list(input.shape)}"
            )
    elif running_mean is None:
        raise ValueError("bn_act: running_mean and running_var are required when training=False")


def _check_parameters(input: Tensor, **parameters: Tensor | None) -> None:
    channels, dtype = input.shape[1], input.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    for name, value in parameters.items():
        if value is None:
            continue
        if value.shape != (channels,):
            raise ValueError(f"bn_act: {name} must have shape [C] = [{channels}], got {list(value.shape)}")
        if value.device != input.device:
            raise ValueError(f"bn_act: {name} is on {value.device}, input on {input.device}")
        if value.dtype != dtype and not (half and value.dtype == torch.float32):
            raise ValueError(f"bn_act: {name} must be {dtype} or, beside a half input, float32; got {value.dtype}")


def parameters(input: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    channels, dtype = input.shape[1], stat_dtype(input)
    ones = input.new_ones(channels, dtype=dtype) if weight is None else _as(weight, dtype)
    zeros = input.new_zeros(channels, dtype=dtype) if bias is None else _as(bias, dtype)
    return ones, zeros


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of `dtype`; asking first is quicker than converting what needs no conversion."""
    if value.dtype != dtype:
        value = value.to(dtype)
    return value if value.is_contiguous() else value.contiguous()


def _statistics(input: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and inverse standard deviation in the stat dtype; 0 and 1 where a block has no BatchNorm."""
    dtype = stat_dtype(input)
    if mean is None or var is None:
        return input.new_zeros(input.shape[1], dtype=dtype), input.new_ones(input.shape[1], dtype=dtype)
    return _as(mean, dtype), torch.rsqrt(_as(var, dtype) + eps)


# --- fastgan::bn_act_train and bn_act_eval, and their gradient ------------------------------------


def _train(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    slope: float,
    backend: str | Choice | None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
):
    """The last three only where it is called directly: an operation that changes its arguments is apart from one that
    is differentiated."""
    input = dense(input)
    choice = choose("bn_act", input, backend)
    if choice.whole:
        results = choice.whole[0](input, weight, bias, running_mean, running_var, momentum, eps, slope)
        if running_mean is not None and running_var is not None:
            increment_version((running_mean, running_var))
        return results
    mean, m2 = choice.run("bn_stats", input)
    n = input.numel() // input.shape[1]
    var = m2 / n
    z = choice.run("bn_act", input, *_statistics(input, mean, var, eps), *parameters(input, weight, bias), slope)
    if running_mean is not None:
        _update(running_mean, running_var, mean, var, n, momentum, choice.asked)
    return z, mean, var


def _train_fake(input, weight, bias, eps, slope, backend):
    stat = input.new_empty(input.shape[1], dtype=stat_dtype(input))
    return torch.empty_like(dense(input)), stat, torch.empty_like(stat)


def _eval(input: Tensor, weight: Tensor | None, bias: Tensor | None, mean, var, eps: float, slope: float, backend):
    input = dense(input)
    choice = choose("bn_act", input, backend)
    if choice.whole:
        return choice.whole[1](input, weight, bias, mean, var, eps, slope)
    return choice.run("bn_act", input, *_statistics(input, mean, var, eps), *parameters(input, weight, bias), slope)


def _eval_fake(input, weight, bias, mean, var, eps, slope, backend):
    return torch.empty_like(dense(input))


def _grad(
    dz, input, weight, bias, mean, var, eps, slope, training, needs_input, needs_affine, backend
) -> tuple[Tensor, Tensor, Tensor]:
    input = dense(input)
    dz = like(dz, input)
    choice = choose("bn_act", input, backend)
    if choice.whole:
        gradient = choice.whole[2]
        return gradient(dz, input, weight, bias, mean, var, eps, slope, training, needs_input, needs_affine)
    run = choice.run
    args = (dz, input, *_statistics(input, mean, var, eps), *parameters(input, weight, bias), slope)
    sums = run("bn_act_reduce", *args) if training or needs_affine else (None, None)
    if not needs_input:
        dy = input.new_empty(0)
    elif training:
        dy = run("bn_act_backward", *args, *sums, input.numel() // input.shape[1])
    else:
        dy = run("bn_act_backward", *args, None, None, 0)
    grad_weight, grad_bias = (
        input.new_empty(0) if value is None or not needs_affine else _as(total, value.dtype)
        for value, total in zip((weight, bias), sums, strict=True)
    )
    return dy, grad_weight, grad_bias


def _grad_fake(dz, input, weight, bias, mean, var, eps, slope, training, needs_input, needs_affine, backend):
    grads = [
        input.new_empty(0) if value is None or not needs_affine else value.new_empty(value.shape)
        for value in (weight, bias)
    ]
    return torch.empty_like(dense(input)) if needs_input else input.new_empty(0), *grads


def _first_gradient(ctx, dz: Tensor | None, training: bool, constants, backend: str | Choice | None):
    """The gradients by input, weight and bias; `constants` are eps and slope."""
    if dz is None:
        return None, None, None
    needs_input, needs_weight, needs_bias = ctx.needs_input_grad[1:4]
    args = (dz, *ctx.saved_tensors, *constants, training, needs_input, needs_weight or needs_bias)
    if is_plain(*args[:6]) and not is_heard():
        dy, grad_weight, grad_bias = direct.bn_act_grad(*args, backend)
    else:
        asked = backend.asked if type(backend) is Choice else backend
        dy, grad_weight, grad_bias = torch.ops.fastgan.bn_act_grad(*args, asked)
    return (
        dy if needs_input else None,
        grad_weight if needs_weight else None,
        grad_bias if needs_bias else None,
    )


class _Train(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, input, weight, bias, eps, slope, backend, *running):
        z, mean, var = compute(input, weight, bias, eps, slope, backend, *running)
        ctx.save_for_backward(input, weight, bias, mean, var)
        ctx.how = (eps, slope), backend
        ctx.mark_non_differentiable(mean, var)
        ctx.set_materialize_grads(False)
        return z, mean, var

    @staticmethod
    def backward(ctx, dz, _mean, _var):
        return None, *_first_gradient(ctx, dz, True, *ctx.how), *[None] * 6


class _Whole(torch.autograd.Function):
    """Either of them and the update of the running statistics by a backend's whole kernels, with nothing in between."""

    @staticmethod
    def forward(ctx, how, input, weight, bias):
        ctx.how = how
        choice, eps, slope, training, mean, var, momentum = how
        train, evaluate, _ = choice.whole
        if training:
            running = mean, var
            z, mean, var = train(input, weight, bias, mean, var, momentum, eps, slope)
            if running[0] is not None:
                increment_version(running)
        else:
            z = evaluate(input, weight, bias, mean, var, eps, slope)
        ctx.save_for_backward(input, weight, bias, mean, var)
        return z

    @staticmethod
    def backward(ctx, dz):
        choice, eps, slope, training, *_ = ctx.how
        if torch.is_grad_enabled() or is_heard() or type(dz) is not Tensor:
            return None, *_first_gradient(ctx, dz, training, (eps, slope), choice)
        input, weight, bias, mean, var = ctx.saved_tensors
        _, needs_input, needs_weight, needs_bias = ctx.needs_input_grad
        affine, dz = needs_weight or needs_bias, like(dz, input)
        dy, grad_weight, grad_bias = choice.whole[2](
            dz, input, weight, bias, mean, var, eps, slope, training, needs_input, affine
        )
        return (
            None, dy if needs_input else None, grad_weight if needs_weight else None, grad_bias if needs_bias else None,
        )  # fmt: skip


class _Eval(torch.autograd.Function):
    @staticmethod
    def forward(ctx, compute, input, weight, bias, mean, var, eps, slope, backend):
        z = compute(input, weight, bias, mean, var, eps, slope, backend)
        ctx.save_for_backward(input, weight, bias, mean, var)
        ctx.how = (eps, slope), backend
        ctx.set_materialize_grads(False)
        return z

    @staticmethod
    def backward(ctx, dz):
        return None, *_first_gradient(ctx, dz, False, *ctx.how), None, None, None, None, None


class _Grad(torch.autograd.Function):
    """The gradient operation; its own gradient goes through the definition, and so does every higher one."""

    @staticmethod
    def forward(
        ctx, compute, dz, input, weight, bias, mean, var, eps, slope, training, needs_input, needs_affine, backend
    ):
        ctx.save_for_backward(dz, input, weight, bias, mean, var)
        ctx.constants = (eps, slope, training, needs_input, needs_affine)
        ctx.set_materialize_grads(False)
        return compute(dz, input, weight, bias, mean, var, eps, slope, training, needs_input, needs_affine, backend)

    @staticmethod
    def backward(ctx, *cotangents):
        *given, mean, var = ctx.saved_tensors
        eps, slope, training, needs_input, needs_affine = ctx.constants

        def definition(y, weight, bias):
            by = (mean, var)
            if training:
                by = stats(y)
                by = (by[0], by[1] / (y.numel() // y.shape[1]))
            ones, zeros = parameters(y, None, None)
            gamma, beta = ones if weight is None else weight, zeros if bias is None else bias
            return apply(y, *_statistics(y, *by, eps), gamma, beta, slope)

        needed = (needs_input, needs_affine, needs_affine)
        asked = [c if need else None for c, need in zip(cotangents, needed, strict=True)]
        dtype = stat_dtype(given[1])
        return None, *gradient_of_gradient(definition, given, asked, ctx.needs_input_grad[1:5], dtype), *[None] * 8


_FORWARD = "Tensor input, Tensor? weight, Tensor? bias"
_LAST = "float eps, float negative_slope"
register(
    f"bn_act_train({_FORWARD}, {_LAST}, str? backend) -> (Tensor, Tensor, Tensor)",
    _train,
    _train_fake,
    _Train,
)
register(
    f"bn_act_eval({_FORWARD}, Tensor? mean, Tensor? var, {_LAST}, str? backend) -> Tensor",
    _eval,
    _eval_fake,
    _Eval,
)
register(
    f"bn_act_grad(Tensor grad_output, {_FORWARD}, Tensor? mean, Tensor? var, {_LAST}, bool training, "
    "bool needs_input, bool needs_affine, str? backend) -> (Tensor, Tensor, Tensor)",
    _grad,
    _grad_fake,
    _Grad,
)


# --- the split operations, for synchronised statistics: not differentiable ------------------------


def _split(name: str):
    def implementation(*given):
        *args, backend = given
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        y = tensors[1] if name in ("bn_act_reduce", "bn_act_backward") else tensors[0]
        out = choose("bn_act", y, backend).run(name, *args)
        # A kernel may return two rows of one tensor; results of a registered operation must not share memory.
        return tuple(t.clone() for t in out) if isinstance(out, tuple) else out

    return implementation


def _update(running_mean, running_var, mean, var, n, momentum, backend):
    if backend is None and not mean.is_cuda:  # O(C) on CPU: not worth a choice
        run("eager", "update_running_stats", running_mean, running_var, mean, var, n, momentum)
        return
    choose("bn_act", mean, backend).run("update_running_stats", running_mean, running_var, mean, var, n, momentum)
    increment_version((running_mean, running_var))


def _two_stats(y):
    return tuple(y.new_empty(y.shape[1], dtype=stat_dtype(y)) for _ in range(2))


_PER_CHANNEL = "Tensor mean, Tensor invstd, Tensor weight, Tensor bias, float negative_slope"
register(
    "bn_stats(Tensor input, str? backend) -> (Tensor, Tensor)",
    _split("bn_stats"),
    lambda y, *_: _two_stats(y),
)
register(
    f"bn_act(Tensor input, {_PER_CHANNEL}, str? backend) -> Tensor",
    _split("bn_act"),
    lambda y, *_: torch.empty_like(y),
)
register(
    f"bn_act_reduce(Tensor grad_output, Tensor input, {_PER_CHANNEL}, str? backend) -> (Tensor, Tensor)",
    _split("bn_act_reduce"),
    lambda dz, y, *_: _two_stats(y),
)
register(
    f"bn_act_backward(Tensor grad_output, Tensor input, {_PER_CHANNEL}, Tensor? grad_weight, "
    "Tensor? grad_bias, SymInt count, str? backend) -> Tensor",
    _split("bn_act_backward"),
    lambda dz, y, *_: torch.empty_like(y),
)
register(
    "update_running_stats(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor mean, Tensor var, "
    "SymInt count, float momentum, str? backend) -> ()",
    _update,
    lambda *_: None,
)
