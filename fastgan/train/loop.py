"""The training loop, top to bottom: build, (resume,) step, report, sample, save."""

import math
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from rich.console import Console
from torch import Tensor, nn

from fastgan import images, optim
from fastgan.backends import use_backend
from fastgan.data import Batches, DataWarning, PreparedImages, prepare, to_uint8
from fastgan.devices import check_backend, choose_device, choose_precision
from fastgan.ema import Ema
from fastgan.errors import CheckpointError, FastganError, Interrupted
from fastgan.nn import Discriminator
from fastgan.sample import build_generator, draw_latents
from fastgan.step import GanStep
from fastgan.train import checkpoint
from fastgan.train.config import TrainConfig, check_resumable, save_config
from fastgan.train.log import Log, require_tensorboard
from fastgan.train.processes import Processes
from fastgan.train.progress import Progress, duration
from fastgan.train.run_folder import lock, make_run_folder
from fastgan.versions import device_name, versions

GRID = 64  # fixed latents whose images are followed through training
REPORT_SECONDS = 20.0  # report.html is drawn at checkpoints, but no more often than this


class Diverged(FastganError):
    """A loss, a metric or a weight became NaN or infinite."""


class Trainer:
    """Everything that one run consists of; `run()` trains it to the end.

    Where torch.distributed is initialised, each of its processes makes one, and they train together.

    Args:
        config: with `resume` set, everything is restored from there.
        console: where progress goes; by default standard output. Of several processes, rank 0 alone prints.
    """

    def __init__(self, config: TrainConfig, console: Console | None = None) -> None:
        config.check()
        self.config = config
        self.processes = processes = Processes()
        processes.part(config.batch_size)
        self.console = console or Console(highlight=False, markup=False)
        if not processes.leads:
            self.console = Console(quiet=True, force_terminal=False)
        self.device = processes.own_device(choose_device(config.device))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.precision = choose_precision(config.precision, self.device)
        check_backend(config.backend, self.device, self.precision)
        with processes.one_after_another():
            self.data = _prepare(config, self.console)
        self.batches = Batches(
            self.data,
            config.batch_size,
            seed=config.seed,
            flip=config.flip,
            part=(processes.rank, processes.count),
            device=self.device,
        )
        checkpoint.seed_all(config.seed)
        channels = self.data.channels
        self.generator = build_generator(config, channels)
        self.discriminator = Discriminator(
            config.image_size, channels, config.d_channels, spectral_norm=config.spectral_norm
        )
        for network in (self.generator, self.discriminator):
            if processes.group is not None:
                nn.SyncBatchNorm.convert_sync_batchnorm(network)
            network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.ema = Ema(self.generator, config.ema_kimg, config.ema_rampup)
        self.opt_g, self.opt_d = (
            optim.make_optimizer(
                network.parameters(),
                config.optimizer,
                lr=lr,
                betas=(config.beta1, config.beta2),
                momentum=config.beta1,
                weight_decay=config.weight_decay,
            )
            for network, lr in ((self.generator, config.lr_g), (self.discriminator, config.lr_d))
        )
        self.scaler = torch.amp.GradScaler(self.device.type) if self.precision == torch.float16 else None
        self.step = GanStep(
            self.generator,
            self.discriminator,
            self.opt_g,
            self.opt_d,
            config.loss,
            real_target=1.0 - config.label_smoothing,
            r1=config.r1,
            r2=config.r2,
            penalty_interval=config.penalty_interval,
            wgan_gp=config.wgan_gp,
            generator_interval=config.d_steps,
            clip_grad=config.clip_grad,
            ema=self.ema,
            autocast=None if self.precision == torch.float32 else self.precision,
            scaler=self.scaler,
            process_group=processes.group,
        )
        self.fixed_latents = draw_latents(GRID, config.latent_dim, config.seed).to(self.device)
        self._layers: list[tuple[str, ...]] | None = None
        self.seconds = 0.0  # spent in training steps, over all sessions of the run
        if config.tensorboard:
            require_tensorboard()
        self._lock: IO[str] | None = None
        if config.resume is not None:
            self.run_folder = checkpoint.run_of(config.resume)
        else:
            self.run_folder = processes.told(make_run_folder(config) if processes.leads else None)
        if processes.leads:
            self._lock = lock(self.run_folder)
        if config.resume is not None:
            self._load(config.resume)

    @property
    def kimg(self) -> float:
        return self.step.images / 1000

    def run(self) -> Path:
        """Train until `config.kimg`; returns the run folder.

        Raises:
            Diverged: a metric or a weight is NaN or infinite; nothing is saved after it.
            Interrupted: Ctrl-C or SIGTERM, after saving.
            OSError: the disk is full or not writable; the last checkpoints stay as they were.
        """
        forced = use_backend(self.config.backend) if self.config.backend != "auto" else nullcontext()
        try:
            with forced, _catch_signals() as caught:
                self._run(caught)
        finally:
            self.batches.close()
            if self._lock is not None:
                self._lock.close()
        self.console.print(
            f"{self.run_folder}: done after {duration(self.seconds)} of training. "
            f"Open {self.run_folder / 'report.html'}",
            soft_wrap=True,
        )
        return self.run_folder

    def _run(self, caught: list[int]) -> None:
        if self.processes.leads:
            save_config(self.config, self.run_folder / "config.json")
        self._announce()
        if self.processes.group is not None:  # now, when all are here: the layers of a step exchange statistics
            self._explain_layers()
        if self.step.steps == 0:
            self._sample()
            self._save()  # shows at once whether the disk takes it, and a run can be resumed from its first second
        window = _Window()
        reported = -math.inf
        with self._reports() as log, Progress(self.console, self.config.kimg) as progress:
            while self.kimg < self.config.kimg:
                self._train_step(window)
                progress.advance(self.step.steps, self.kimg)
                stopping = self.processes.largest(caught[0] if caught else 0)  # looked at once: it may come any moment
                last = self.kimg >= self.config.kimg or bool(stopping)
                if last or self._due(self.config.report_kimg) or self._due(self.config.checkpoint_kimg):
                    report = self._report(window)
                    if log is not None:
                        log.write(report)
                    progress.show(report)
                if last or self._due(self.config.sample_kimg):
                    self._sample()
                if last or self._due(self.config.checkpoint_kimg):
                    saved = self._save()
                    if time.monotonic() - reported > REPORT_SECONDS:
                        self._write_html()
                        reported = time.monotonic()
                    if stopping:
                        self._write_html()
                        self.processes.wait()
                        raise Interrupted(stopping, saved)
        self._write_html()
        self.processes.wait()

    def _reports(self) -> AbstractContextManager[Log | None]:
        if not self.processes.leads:
            return nullcontext()
        return closing(Log(self.run_folder, self.step.steps, self.config.tensorboard))

    def _train_step(self, window: "_Window") -> None:
        scale = optim.lr_scale(
            self.kimg,
            total_kimg=self.config.kimg,
            warmup_kimg=self.config.warmup_kimg,
            decay=self.config.lr_decay,
        )
        optim.set_lr(self.opt_g, self.config.lr_g * scale)
        optim.set_lr(self.opt_d, self.config.lr_d * scale)
        start = time.perf_counter()
        window.metrics.append(self.step(next(self.batches)))
        window.seconds += time.perf_counter() - start
        window.images += self.config.batch_size

    def _due(self, interval_kimg: float) -> bool:
        """Whether the step just made crossed a multiple of the interval."""
        interval = interval_kimg * 1000
        before = self.step.images - self.config.batch_size
        return self.step.images // interval > before // interval

    def _report(self, window: "_Window") -> dict[str, Any]:
        """Read the metrics since the last report (the only place that waits for the device) and average them."""
        start = time.perf_counter()
        averages = self._averages(window.metrics)
        seconds = window.seconds + time.perf_counter() - start
        self.seconds += seconds
        report = {
            "step": self.step.steps,
            "kimg": self.kimg,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(window.images / seconds, 1),
            **averages,
            "lr_g": self.opt_g.param_groups[0]["lr"],
            "lr_d": self.opt_d.param_groups[0]["lr"],
        }
        if self.device.type == "cuda":
            report["peak_memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)
        window.clear()
        return report

    def _averages(self, metrics: list[dict[str, Tensor]]) -> dict[str, float]:
        first_step = self.step.steps - len(metrics) + 1
        averages = {}
        wrong: list[tuple[int, str, float]] = []
        for name in sorted({name for entry in metrics for name in entry}):
            at = [index for index, entry in enumerate(metrics) if name in entry]
            values = self.processes.mean(torch.stack([metrics[index][name] for index in at]).double().cpu())
            averages[name] = float(values.mean())
            wrong += [
                (first_step + at[index], name, float(values[index]))
                for index in (~values.isfinite()).nonzero().flatten().tolist()
            ]
        if wrong:
            step, name, value = min(wrong, key=lambda entry: entry[0])
            raise self._diverged(f"step {step}: {name} is {value}")
        return averages

    def _diverged(self, what: str) -> Diverged:
        return Diverged(
            f"{what}. Nothing was saved after it; the last good checkpoint is "
            f"{checkpoint.resolve(self.run_folder)}. Lower --lr-g and --lr-d, or add --r1 or --clip-grad"
        )

    def _sample(self) -> None:
        if not self.processes.leads:
            return
        folder = self.run_folder / "samples"
        folder.mkdir(exist_ok=True)
        with torch.no_grad():
            batches = [to_uint8(self.ema.module(z)) for z in self.fixed_latents.split(self.config.batch_size)]
        images.save_png(images.grid(np.concatenate(batches)), folder / f"kimg-{self.kimg:09.3f}.png")

    def _save(self) -> Path:
        if not self.processes.leads:  # weights and random states are the same everywhere
            return checkpoint.path_of(self.run_folder, self.step.steps)
        checkpoint.set_aside_newer(self.run_folder, self.step.steps)
        random_tensors, random_values = checkpoint.random_states(self.device)
        tensors = {
            **checkpoint.prefixed("generator", self.generator.state_dict()),
            **checkpoint.prefixed("discriminator", self.discriminator.state_dict()),
            **checkpoint.prefixed("ema", self.ema.module.state_dict()),
            **checkpoint.prefixed("opt_g", checkpoint.optimizer_tensors(self.opt_g)),
            **checkpoint.prefixed("opt_d", checkpoint.optimizer_tensors(self.opt_d)),
            **checkpoint.prefixed("random", random_tensors),
        }
        header = {
            "config": self.config.to_json(),
            "channels": self.data.channels,
            "steps": self.step.steps,
            "images": self.step.images,
            "seconds": self.seconds,
            "opt_g": checkpoint.optimizer_settings(self.opt_g),
            "opt_d": checkpoint.optimizer_settings(self.opt_d),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "random": random_values,
            "batches": self.batches.state_dict(),
            "data": self.data.fingerprint,
            "versions": versions(),
            "machine": device_name(self.device),
            "processes": self.processes.count,
        }
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise self._diverged(f"after step {self.step.steps}: {name} is not finite")
        return checkpoint.write(self.run_folder, self.step.steps, tensors, header)

    def _load(self, source: Path) -> None:
        path = checkpoint.resolve(source)
        tensors, header = checkpoint.read(path)
        check_resumable(TrainConfig.from_json(header["config"], str(path)), self.config)
        if (count := header.get("processes", 1)) != self.processes.count:
            raise CheckpointError(
                f"{path}: was trained by {count} process{'es' * (count > 1)}, and {self.processes.count} cannot go on "
                f"bit for bit; start it with torchrun --nproc-per-node {count}"
            )
        if header["data"] != self.data.fingerprint:
            raise CheckpointError(
                f"{path}: was trained on other images than {self.data.source} now holds; a run can only go on with "
                "the same images"
            )
        checkpoint.load_module(self.generator, "generator", tensors, path)
        checkpoint.load_module(self.discriminator, "discriminator", tensors, path)
        checkpoint.load_module(self.ema.module, "ema", tensors, path)
        checkpoint.load_optimizer(self.opt_g, "opt_g", tensors, header["opt_g"], path)
        checkpoint.load_optimizer(self.opt_d, "opt_d", tensors, header["opt_d"], path)
        if self.scaler and header["scaler"]:
            self.scaler.load_state_dict(header["scaler"])
        self.batches.load_state_dict(header["batches"])
        self.step.steps, self.step.images = header["steps"], header["images"]
        self.seconds = header["seconds"]
        checkpoint.set_random_states(checkpoint.part("random", tensors), header["random"], self.device)
        changed = [name for name, value in versions().items() if header["versions"].get(name) != value]
        changed += ["the processor"] if header["machine"] != device_name(self.device) else []
        if changed:
            self.console.print(
                f"note: {', '.join(changed)} changed since this was saved; the run goes on, but perhaps not bit for bit"
            )

    def _announce(self) -> None:
        counts = [sum(p.numel() for p in network.parameters()) for network in (self.generator, self.discriminator)]
        config, data = self.config, self.data
        skipped = f", {len(data.skipped)} files skipped" if data.skipped else ""
        self.console.print(
            f"data       {data.source}: {len(data):,} images{skipped}, {config.image_size} x {config.image_size}, "
            f"{data.channels} channel{'s' if data.channels > 1 else ''}\n"
            f"networks   G {counts[0]:,} and D {counts[1]:,} parameters, loss {config.loss}\n"
            f"device     {self.device} ({device_name(self.device)}), {str(self.precision).removeprefix('torch.')}\n"
            f"training   {config.kimg:g} kimg in steps of {config.batch_size}"
            + (f" on {self.processes.count} processes" if self.processes.group is not None else "")
            + (f", going on from {self.kimg:.1f} kimg" if config.resume else "")
            + f"\nrun        {self.run_folder}",
            soft_wrap=True,
        )

    def _explain_layers(self) -> list[tuple[str, ...]]:
        from fastgan.train.report import layer_rows

        if self._layers is None:  # the same throughout a run
            self._layers = layer_rows(self)
        return self._layers

    def _write_html(self) -> None:
        from fastgan.train.report import write_report

        if self.processes.leads:
            write_report(self.run_folder, self, self._explain_layers())


class _Window:
    """What happened since the last report."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.metrics: list[dict[str, Tensor]] = []
        self.seconds = 0.0
        self.images = 0


@contextmanager
def _catch_signals() -> Iterator[list[int]]:
    """Turn the first Ctrl-C or SIGTERM into an entry of the list, a second one into the usual end."""
    caught: list[int] = []
    usual = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # Ignored signals stay ignored, and a handler that was not set from Python could not be set again.
    usual = {number: handler for number, handler in usual.items() if handler not in (None, signal.SIG_IGN)}

    def note(number: int, frame: Any) -> None:
        caught.append(number)
        signal.signal(number, usual[signal.Signals(number)])

    if threading.current_thread() is not threading.main_thread():
        usual = {}  # signals reach the main thread only, and whoever started this one handles them
    try:
        for number in usual:
            signal.signal(number, note)
        yield caught
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)


@contextmanager
def _notes(console: Console) -> Iterator[None]:
    """Print what the data part warns of (files left out, images enlarged, no cache) as plain lines."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        yield
    for warning in caught:
        console.print(f"note       {warning.message}", soft_wrap=True)


def _prepare(config: TrainConfig, console: Console) -> PreparedImages:
    from rich.progress import Progress as Bar

    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar, _notes(console):
        task = bar.add_task("preparing images", total=None)
        return prepare(
            config.data,
            config.image_size,
            channels=config.channels,
            crop=config.crop,
            cache_dir=config.cache,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
