"""An experiment's budget in steps and reports, for a number of train images."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipfh.config.experiment import Experiment


@dataclass(frozen=True)
class Schedule:
    """When a run reports and when it ends."""

    num_steps: int
    images_per_report: float
    batch_images: int
    epoch_images: int
    """Images in a pass over all train images that take part."""

    @property
    def half_report_steps(self) -> int:
        """Half the number of steps between two reports."""
        return int(min(self.images_per_report / self.batch_images, self.num_steps) / 2)

    def is_report(self, step: int) -> bool:
        """Whether a report is due after this number of steps: at each multiple of `images_per_report`, and at the end.

        A multiple is reached by the first step that has seen at least its images. So all trials of a sweep report at
        the same multiples, whatever their P x K, and less than one batch late: with a report every 100 images,

            batches of 40 images report after step 3 (120 images), 5 (200), 8 (320), ...
            batches of 64 images report after step 2 (128 images), 4 (256), 5 (320), ...
        """
        images, every = step * self.batch_images, self.images_per_report
        return step == self.num_steps or images // every > (images - self.batch_images) // every

    def next_report(self, step: int) -> int:
        """The step, after this number of steps, at which the next report is due."""
        return next(later for later in range(step + 1, self.num_steps + 1) if self.is_report(later))


def make_schedule(experiment: Experiment, num_images: int, num_single: int) -> Schedule:
    """The schedule that sees at least the images of the experiment's budget.

    Args:
        experiment: its budget is in images or in epochs.
        num_images: images of the train items.
        num_single: train items with one image. Where no loss term takes such images, they are in no epoch.
    """
    budget, batch_images = experiment.budget, experiment.batch.images
    epoch_images = num_images if experiment.loss.takes_singles else num_images - num_single
    images = budget.images or math.ceil(budget.epochs * epoch_images)
    num_steps = max(1, math.ceil(images / batch_images))
    return Schedule(num_steps, budget.report_every or images / 10, batch_images, epoch_images)
