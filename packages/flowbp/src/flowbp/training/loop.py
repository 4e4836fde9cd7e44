"""The training loop, the same for one process and many."""

import signal
from dataclasses import dataclass

import numpy as np
import torch
from accelerate import Accelerator

from flowbp.backbones.loading import load_checkpoint
from flowbp.config import TrainConfig
from flowbp.data.prompts import load_prompts
from flowbp.evaluation.evaluate import Evaluation
from flowbp.evaluation.image_statistics import rms_distance
from flowbp.evaluation.results import delete_evaluations, load_evaluations, save_evaluation
from flowbp.training import watchdog
from flowbp.training.loading import load_models, load_rewards
from flowbp.training.preflight import cut_prompts
from flowbp.training.progress import NullReporter
from flowbp.training.trainer import Trainer
from imgen_common.errors import UserError
from imgen_common.images import grid
from imgen_common.run_folder.folder import RunFolder


def train(config: TrainConfig, run: RunFolder, accelerator: Accelerator, reporter: NullReporter) -> None:
    """The run, from its last checkpoint if it has one, to its last update; evaluates before and after.

    Raises KeyboardInterrupt after saving if Ctrl-C was pressed, UserError on anything the user can mend.
    """
    if not config.heldout:
        reporter.alert(
            "no held-out reward: what is gained may be reward hacking, and nothing would show it; set `heldout`"
        )
    reporter.stage("loading models")
    models = load_models(config, accelerator.device, is_main=accelerator.is_main_process, with_rewards=False)
    loop = TrainingLoop(Trainer(config, models, accelerator), run, reporter)
    loop.resume()
    loop.report_cut_prompts()
    loop.embed_prompts()
    reporter.stage("loading rewards")  # after the text encoders, which may be larger than the network, were unloaded
    models.rewards = load_rewards(config, accelerator.device)
    loop.evaluate_base()
    reporter.stage("training")
    with GracefulShutdown() as shutdown:
        loop.run_updates(shutdown)
    with loop.trainer.state.ema_weights():
        loop.run_full_evaluation("trained")


class GracefulShutdown:
    """Remembers a Ctrl-C so that the update in flight ends and is saved; a second one stops at once."""

    def __init__(self) -> None:
        self.requested = False

    def __enter__(self) -> "GracefulShutdown":
        self._before = signal.signal(signal.SIGINT, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _on_signal(self, *_: object) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True


@dataclass
class TrainingLoop:
    """A trainer, the folder of its run, and a reporter of its progress.  All processes call all methods."""

    trainer: Trainer
    run: RunFolder
    reporter: NullReporter

    def __post_init__(self) -> None:
        config = self.config = self.trainer.config
        evaluation, key = config.eval, config.data.key
        self.full_prompts = load_prompts(evaluation.prompts, key, evaluation.num_prompts)
        self.quick_prompts = load_prompts(evaluation.quick_prompts, key, evaluation.quick_num_prompts)
        self.watches = config.watchdog.enabled and evaluation.every > 0

    # --- before the first update -------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Restores the newest checkpoint, if there is one, and deletes what was recorded after it."""
        if (latest := self.run.latest_checkpoint()) is not None:
            checkpoint = load_checkpoint(self.run, latest)
            self.trainer.restore(checkpoint.step, checkpoint.tensors)
        self.trainer.accelerator.wait_for_everyone()
        update = self.trainer.update
        self.run.rewind(update or -1)  # before the first update the base is evaluated again
        if self.run.is_main:
            watchdog.drop_findings_after(self.run.path, update)
            if update < self.config.max_train_steps:
                delete_evaluations(self.run.path, "trained")

    def report_cut_prompts(self) -> None:
        """Says which text encoders and rewards do not read all of the prompts."""
        if self.run.is_main:
            for text in cut_prompts(self.config):
                self.reporter.alert(text)

    def embed_prompts(self) -> None:
        """Embeds all prompts that the run needs, from its very beginning, so that a resumed one batches them alike."""
        if self.config.data.embeddings == "live":
            return
        self.reporter.stage("embedding prompts")
        rank, world = self.trainer.accelerator.process_index, self.trainer.accelerator.num_processes
        evaluated = [*self.full_prompts[rank::world], *self.quick_prompts[rank::world]]
        self.trainer.embed_prompts([*self.trainer.training_prompts(), *evaluated])

    def evaluate_base(self) -> None:
        """The model before the first update, at the seeds that everything is compared at."""
        if self.trainer.update > 0:
            return
        self.run_full_evaluation("base")
        if self.watches:
            base = self.run_quick_evaluation()
            if self.run.is_main:
                save_evaluation(self.run.path / watchdog.FOLDER, "base", self.config.guidance_scale, base)

    # --- updates -----------------------------------------------------------------------------------------------------

    def run_updates(self, shutdown: GracefulShutdown) -> None:
        """Update after update, evaluated and saved at intervals.  Raises KeyboardInterrupt if asked to stop."""
        trainer, config = self.trainer, self.config
        while trainer.update < config.max_train_steps:
            self.run_update()

            # once in a while: a quick evaluation on prompts that are neither trained on nor reported
            alarmed = False
            evaluated = config.eval.every > 0 and trainer.update % config.eval.every == 0
            if evaluated:
                with trainer.state.ema_weights():
                    quick = self.run_quick_evaluation()
                alarmed = any_process(trainer.accelerator, self.run_watchdog(quick))

            # a checkpoint: at intervals, where it was evaluated, at the end, and when asked to stop
            last = trainer.update == config.max_train_steps
            stopping = any_process(trainer.accelerator, shutdown.requested)
            if last or stopping or evaluated or trainer.update % config.checkpoint.every == 0:
                self.save_checkpoint()
            if stopping and not last:
                raise KeyboardInterrupt
            if alarmed and config.watchdog.stop:
                break

    def run_update(self) -> None:
        """One update, or none at all: a gradient that is not finite is refused before it touches a weight."""
        try:
            metrics = self.trainer.step()
        except FloatingPointError as error:
            self.save_checkpoint()
            raise UserError(
                f"{error}; the state before it is saved in {self.run.path}; lower optim.learning_rate or "
                "optim.max_grad_norm"
            ) from None
        self.run.log(self.trainer.update, {f"train/{name}": value for name, value in metrics.items()})
        self.reporter.update(self.trainer.update, metrics)

    def save_checkpoint(self) -> None:
        """A checkpoint of the state after the updates made so far; the last healthy one is never pruned."""
        self.run.save_checkpoint(self.trainer.update, self.trainer.state.state_dict(), {})
        healthy = watchdog.last_healthy_update(self.run.path)
        self.run.prune(self.config.checkpoint.keep, keep=() if healthy is None else (healthy,))

    # --- evaluations -------------------------------------------------------------------------------------------------

    def run_full_evaluation(self, name: str) -> None:
        """Evaluates at every guidance scale of the configuration and the training's own, and keeps the rows."""
        config = self.config
        for scale in dict.fromkeys((config.guidance_scale, *config.eval.guidance_scale)):
            label = f"{name}, guidance {scale:g}"
            self.reporter.stage(f"evaluating {label}")
            result = self.trainer.evaluate(self.full_prompts, config.eval.prompts, scale, self.reporter, label)
            if self.run.is_main:
                save_evaluation(self.run.path, name, scale, result)

    def run_quick_evaluation(self) -> Evaluation:
        """The network as it is now on the quick prompts, logged with a grid of the first images."""
        config, update = self.config, self.trainer.update
        source, scale = config.eval.quick_prompts, config.guidance_scale
        quick = self.trainer.evaluate(self.quick_prompts, source, scale, self.reporter, "quick")
        self.run.log(update, {f"eval/{name}": float(np.mean(values)) for name, values in quick.scores.items()})
        if self.run.is_main:
            images = quick.images[:24]
            self.run.log_image(update, "quick", grid(images, columns=8, scale=max(1, 96 // images.shape[-1])))
        return quick

    def run_watchdog(self, quick: Evaluation) -> bool:
        """Compares the model with its base, logs what was found; whether there is an alert (on the main process)."""
        config, update, path = self.config, self.trainer.update, self.run.path
        if not self.watches:
            return False
        # all processes must take part in gathering; only the main one compares
        adapters = {} if config.lora is None else self.trainer.state.gather_ema()
        if not self.run.is_main:
            return False
        base = load_evaluations(path / watchdog.FOLDER).get(("base", config.guidance_scale))
        if base is None or base.prompts != quick.prompts:
            self.reporter.alert(f"update {update}: not watched, the base has not been evaluated on these quick prompts")
            return False
        trained, heldout = ([scorer.name for scorer in part] for part in (config.rewards, config.heldout))
        drift = watchdog.image_drift(base.images(), quick.images)
        finding = watchdog.compare_with_base(config.watchdog, base, quick, trained, heldout, drift)
        watchdog.append_finding(path, update, finding)
        measures = {f"watch/{name}": value for name, value in finding.measures.items()}
        measures["watch/distance"] = rms_distance(base.images(), quick.images).mean().item()
        if config.lora is not None:
            measures["watch/lora_norm"] = watchdog.adapter_norm(adapters, config.lora.alpha / config.lora.rank)
        self.run.log(update, measures)
        for alert in finding.alerts:
            self.reporter.alert(f"update {update}: {alert}")
        return bool(finding.alerts)


def any_process(accelerator: Accelerator, flag: bool) -> bool:
    """Whether the flag is up on any process: Ctrl-C may reach one before and another after the same update."""
    if accelerator.num_processes == 1:
        return flag
    flags = torch.tensor(float(flag), device=accelerator.device)
    return bool(accelerator.reduce(flags, "sum").item() > 0)
