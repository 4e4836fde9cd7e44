"""The training loop, the same for one process and many."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from flowbp.config import TrainConfig
from flowbp.data.edits import source_thumbnails
from flowbp.data.prompts import load_prompts, load_quick_prompts
from flowbp.evaluation.evaluate import Evaluation, NotFiniteError
from flowbp.evaluation.image_statistics import rms_distance
from flowbp.evaluation.results import delete_evaluations, load_evaluations, save_evaluation
from flowbp.training import watchdog
from flowbp.training.loading import load_models, load_rewards
from flowbp.training.preflight import unread_prompts
from flowbp.training.progress import NullReporter
from flowbp.training.trainer import DIVERGED, LOWER, Trainer
from imgen_common.devices import any_process, float32_matmul_precision
from imgen_common.errors import UserError, quoted
from imgen_common.images import grid, to_pil
from imgen_common.run_folder.folder import RunFolder
from imgen_common.run_folder.listing import last_healthy_update, read_alerts
from imgen_common.shutdown import GracefulShutdown

QUICK_METRICS = ("eval/", "eval_preview/")
"""How the names of the scores of quick evaluations begin: of the autoencoder's images, and of a tiny decoder's."""


def train(config: TrainConfig, run: RunFolder, accelerator: Accelerator, reporter: NullReporter) -> None:
    """The run, from its last checkpoint if it has one, to its last update; evaluates before and after.

    Raises KeyboardInterrupt after Ctrl-C, SIGTERM or SIGHUP, with the updates saved that were made; UserError on
    anything the user can mend.
    """
    with float32_matmul_precision(config.matmul_precision):
        _train(config, run, accelerator, reporter)


def _train(config: TrainConfig, run: RunFolder, accelerator: Accelerator, reporter: NullReporter) -> None:
    if not config.heldout:
        reporter.alert(
            "no held-out reward: what is gained may be reward hacking, and nothing would show it; set `heldout`"
        )
    reporter.stage("loading models")
    models = load_models(
        config,
        accelerator.device,
        is_main=accelerator.is_main_process,
        with_rewards=False,
        with_adapter=run.latest_checkpoint() is None,
    )
    # until here there is nothing to save, and a signal stops at once
    shutdown = GracefulShutdown(
        "stopping after this update, or this batch of an evaluation; once more to stop at once" if run.is_main else ""
    )
    loop = TrainingLoop(Trainer(config, models, accelerator), run, reporter, shutdown)
    loop.resume()
    loop.report_unread_prompts()
    loop.embed_prompts()
    reporter.stage("loading rewards")  # after the text encoders, which may be larger than the network, were unloaded
    models.rewards = load_rewards(config, accelerator.device)
    with shutdown:
        loop.evaluate_base()
        reporter.stage("training")
        loop.run_updates()
        with loop.trainer.state.ema_weights():
            loop.run_full_evaluation("trained")


@dataclass
class TrainingLoop:
    """A trainer, its run folder, a reporter of its progress and what stops it.  All processes call all methods."""

    trainer: Trainer
    run: RunFolder
    reporter: NullReporter
    shutdown: GracefulShutdown

    def __post_init__(self) -> None:
        config = self.config = self.trainer.config
        evaluation, data = config.eval, config.data
        self.full_prompts = load_prompts(evaluation.prompts, data, evaluation.num_prompts)
        self.quick_prompts = load_quick_prompts(evaluation, data)
        self.watches = config.watchdog.enabled and evaluation.every > 0
        self.evaluation_due = False

    # --- before the first update -------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restores the newest checkpoint, if there is one, and deletes what was recorded after it."""
        if (latest := self.run.latest_checkpoint()) is not None:
            checkpoint = self.run.load_checkpoint(latest)
            self.trainer.restore(checkpoint.step, checkpoint.tensors)
            self.evaluation_due = bool(checkpoint.state.get("evaluation_due")) and self.config.eval.every > 0
        self.trainer.accelerator.wait_for_everyone()
        update = self.trainer.update
        # what a damaged checkpoint of the end had led to is dropped with it
        is_last = update == self.config.max_train_steps or self.has_watchdog_ended()
        ended = is_last and all(line["step"] <= update for line in self.run.metrics())
        self.run.rewind(update or -1)  # before the first update the quick evaluation is made again
        if self.run.is_main:
            watchdog.drop_findings_after(self.run.path, update)
            if not ended:
                delete_evaluations(self.run.path, "trained")

    def report_unread_prompts(self) -> None:
        """Says which text encoders and rewards do not read all of the prompts."""
        if self.run.is_main:
            for text in unread_prompts(self.config):
                self.reporter.alert(text)

    def embed_prompts(self) -> None:
        """Embeds all prompts that the run needs, from its very beginning, so that a resumed one batches them alike."""
        if self.config.data.embeddings == "live":
            return
        self.reporter.stage("embedding prompts")
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        # of fewer prompts than processes, the first
        parts = [prompts[rank::world] or prompts[:1] for prompts in (self.full_prompts, self.quick_prompts)]
        evaluated = [prompt for part in parts for prompt in part]
        self.trainer.embed_prompts([*self.trainer.training_prompts(), *evaluated])

    def evaluate_base(self) -> None:
        """The model before the first update, at the seeds that everything is compared at."""
        if self.trainer.update > 0:
            return
        self.run_full_evaluation("base")
        if self.watches:
            base = self.run_quick_evaluation()
            if self.run.is_main:
                save_evaluation(self.run.path / watchdog.FOLDER, "base", self.config.eval_guidance_scales[0], base)
            self.log_quick_evaluation(base, {})

    # --- updates -----------------------------------------------------------------------------------------------------

    def run_updates(self) -> None:
        """Update after update, saved and evaluated at intervals.  Raises KeyboardInterrupt if asked to stop."""
        trainer, config = self.trainer, self.config
        # a run that was stopped within an evaluation begins with it
        if self.is_evaluation_missing() and self.evaluate_update():
            return
        # one that the watchdog had ended, and that was stopped before its last evaluations, goes on to these
        ended = trainer.update < config.max_train_steps and self.run.is_main and self.has_watchdog_ended()
        if any_process(ended, trainer.accelerator.device):
            self.reporter.alert(
                f"update {trainer.update}: the watchdog ended the training; watchdog.stop=false goes on"
            )
            return
        while trainer.update < config.max_train_steps:
            self.run_update()

            # a checkpoint: at intervals, before it is evaluated, at the end, and when asked to stop
            last = trainer.update == config.max_train_steps
            stopping = any_process(self.shutdown.requested, trainer.accelerator.device)
            if last or stopping or self.is_evaluated() or trainer.update % config.checkpoint.every == 0:
                self.save_checkpoint()
            if stopping and not last:
                raise KeyboardInterrupt
            if self.is_evaluated() and self.evaluate_update():
                break

    def is_evaluated(self) -> bool:
        """Whether the model is evaluated after this update."""
        return self.config.eval.every > 0 and self.trainer.update % self.config.eval.every == 0

    def is_evaluation_missing(self) -> bool:
        """Whether the run was stopped between the checkpoint that it resumed from and the evaluation that follows."""
        update = self.trainer.update
        logged = [name for line in self.run.metrics() if line["step"] == update for name in line]
        done = any(name.startswith(QUICK_METRICS) for name in logged)
        due = self.run.is_main and self.evaluation_due and not done
        return any_process(due, self.trainer.accelerator.device)

    def evaluate_update(self) -> bool:
        """Evaluates on prompts that are neither trained on nor reported; whether the watchdog ends the run."""
        with self.trainer.state.ema_weights():
            quick = self.run_quick_evaluation()
        measures = self.run_watchdog(quick)
        # last: a run that is stopped before makes the evaluation again when it is resumed
        self.log_quick_evaluation(quick, measures)
        self.prune_checkpoints()
        return any_process(self.run.is_main and self.has_watchdog_ended(), self.trainer.accelerator.device)

    def has_watchdog_ended(self) -> bool:
        """Whether an alert after this update ends the training; to be asked on the main process, which keeps them."""
        stops = self.watches and self.config.watchdog.stop
        return stops and bool(read_alerts(self.run.path).get(self.trainer.update))

    def run_update(self) -> None:
        """One update, or none at all: a gradient that is not finite is refused before it touches a weight."""
        try:
            metrics = self.trainer.step()
        except NotFiniteError as error:
            raise UserError(self._describe_way_on(error)) from None
        self.run.log(self.trainer.update, {f"train/{name}": value for name, value in metrics.items()})
        self.reporter.update(self.trainer.update, metrics)

    def _describe_way_on(self, error: NotFiniteError) -> str:
        """What an update has failed at, and from where to go on: its own state is not saved, as it would fail again."""
        update, saved = self.trainer.update, self.run.checkpoints()
        message = f"update {update + 1}: {error}; "
        if error.advice == DIVERGED and update in saved:
            saved.remove(update)
            if not saved:
                return f"{message}then start anew, since the only checkpoint has these weights"
            message += f"remove {self.run.path}/checkpoints/step-{update:06d}, which has these weights; "
        if error.advice not in (DIVERGED, LOWER):  # a resume takes no other model, reward or precision
            return f"{message}then start anew"
        command = f"flowbp train --resume {quoted(self.run.path)} --set KEY=VALUE"
        return f"{message}then go on from update {max(saved, default=0)} with: {command}"

    def save_checkpoint(self) -> None:
        """A checkpoint of the state after the updates made so far."""
        self.run.save_checkpoint(
            self.trainer.update, self.trainer.state.state_dict(), {"evaluation_due": self.is_evaluated()}
        )
        self.prune_checkpoints()

    def prune_checkpoints(self) -> None:
        """Removes old checkpoints, but never the last healthy one."""
        healthy = last_healthy_update(self.run.path)
        self.run.prune(self.config.checkpoint.keep, keep=() if healthy is None else (healthy,))

    # --- evaluations -------------------------------------------------------------------------------------------------

    def run_full_evaluation(self, name: str) -> None:
        """Evaluates at every guidance scale of the configuration and the training's own, and keeps the rows.

        Those that a stopped process had made are not made again.
        """
        config = self.config
        done = load_evaluations(self.run.path) if self.run.is_main else {}
        for scale in config.eval_guidance_scales:
            if any_process((name, scale) in done, self.trainer.accelerator.device):
                continue
            label = f"{name}, guidance {scale:g}"
            self.reporter.stage(f"evaluating {label}")
            result = self._evaluate(self.full_prompts, config.eval.prompts, scale, label)
            if self.run.is_main:
                save_evaluation(self.run.path, name, scale, result)

    def run_quick_evaluation(self) -> Evaluation:
        """The network as it is now on the quick prompts; a grid of the first images is kept."""
        config, update = self.config, self.trainer.update
        source, scale = config.eval.quick_prompts, config.eval_guidance_scales[0]
        quick = self._evaluate(self.quick_prompts, source, scale, "quick")
        if self.run.is_main:
            cells = []
            for prompt, image in zip(quick.prompts, to_pil(quick.images[:24]), strict=False):
                cells += [*source_thumbnails(prompt, image.size)[:1], image]
            enlarged = grid(cells, columns=8, scale=max(1, 96 // quick.images.shape[-1]))
            self.run.log_image(update, f"quick{_mark(quick)}", enlarged)
        return quick

    def log_quick_evaluation(self, quick: Evaluation, measures: Mapping[str, float]) -> None:
        """Logs the scores of a quick evaluation, by which a resumed run knows it, and what the watchdog measured."""
        scores = {f"eval{_mark(quick)}/{name}": float(np.mean(values)) for name, values in quick.scores.items()}
        self.run.log(self.trainer.update, {**scores, **measures})

    def _evaluate(self, prompts: Sequence[str], source: str, scale: float, label: str) -> Evaluation:
        """Raises KeyboardInterrupt if asked to stop: what was trained is saved, and a resumed run evaluates it."""

        def stop_if_asked() -> None:
            if any_process(self.shutdown.requested, self.trainer.accelerator.device):
                raise KeyboardInterrupt

        def on_progress(done: int) -> None:
            self.reporter.evaluation(label, done, len(prompts))

        return self.trainer.evaluate(prompts, source, scale, on_progress, stop_if_asked, quick=label == "quick")

    def run_watchdog(self, quick: Evaluation) -> dict[str, float]:
        """Compares the model with its base, keeps the alerts; what it measured (on the main process), to be logged."""
        config, update, path = self.config, self.trainer.update, self.run.path
        if not self.watches:
            return {}
        # all processes must take part in gathering; only the main one compares
        adapters = {} if config.lora is None else self.trainer.state.gather_ema()
        if not self.run.is_main:
            return {}
        kept = path / watchdog.FOLDER
        base = load_evaluations(kept).get(("base", config.eval_guidance_scales[0])) if kept.is_dir() else None
        if base is None or (base.prompts, base.preview) != (quick.prompts, quick.preview):
            what = "these quick prompts with this decoder"
            self.reporter.alert(f"update {update}: not watched, the base has not been evaluated on {what}")
            return {}
        trained, heldout = ([scorer.name for scorer in part] for part in (config.rewards, config.heldout))
        drift = watchdog.image_drift(base.images(), quick.images)
        finding = watchdog.compare_with_base(config.watchdog, base, quick, trained, heldout, drift)
        watchdog.append_finding(path, update, finding)
        measures = {f"watch/{name}": value for name, value in finding.measures.items()}
        measures["watch/distance"] = rms_distance(base.images(), quick.images).mean().item()
        if config.lora is not None:
            measures["watch/lora_norm"] = watchdog.adapter_norm(adapters, config.lora)
        for alert in finding.alerts:
            self.reporter.alert(f"update {update}: {alert}")
        return measures


def _mark(quick: Evaluation) -> str:
    """What sets the scores of a tiny decoder's images apart: nobody is to compare them with those of true images."""
    return "_preview" if quick.preview else ""
